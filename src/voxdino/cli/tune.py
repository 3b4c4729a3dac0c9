"""`voxdino tune`: what to clean up after a model, and what `predict --fast` costs it, from its held-back cases."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import DatasetArgument, Device, DeviceOption, JsonOption
from voxdino.cli.output import counting, end


def tune(
    dataset: DatasetArgument,
    run: Annotated[Path, typer.Option("--run", "-r", help="The run folder of a fine-tuned model.")],
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
) -> None:
    """Choose per class what is cleaned up after prediction, and measure --fast, on the run's held-back cases."""
    from voxdino.core.errors import CheckpointError
    from voxdino.core.safe_files import read_json
    from voxdino.inference.load import load_model
    from voxdino.inference.tune import tune as choose
    from voxdino.models.precision import resolve_device
    from voxdino.preparation.dataset import read_dataset

    model = load_model(run, resolve_device(device))
    record = read_json(run / "run.json")
    if not isinstance(record, dict) or "split" not in record:
        raise CheckpointError("names no held-back cases.", where=run / "run.json", fix="give a run of this version.")
    held_back = set(record["split"]["val"])
    cases = [case for case in read_dataset(dataset, model.plan.read_options).cases if case.id in held_back]
    with counting("predicting") as on_progress:
        chosen, cost = choose(model, run, cases, on_progress=on_progress)
    if not json:
        for name, rule in chosen.rules.items():
            found = chosen.evidence[name]
            asked = ", ".join(f"{key} {value}" for key, value in rule.model_dump(exclude_defaults=True).items())
            print(f"{name}: {asked}  (Dice {found.before:.3f} -> {found.after:.3f} over {found.num_cases} cases)")
        if not chosen.rules:
            print("cleaning up helps no class: predictions stay as they are")
        print(cost.in_words())
    end({"postprocessing": chosen.to_json(), "fast": cost.to_json()}, None, as_json=json)
