"""`voxdino pretrain`: teach a backbone on a pool of slices, without labels."""

import os
from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import (
    DEFAULT_WORKDIR,
    BackboneOption,
    Device,
    DeviceOption,
    DryRunOption,
    JsonOption,
    SeedOption,
    SetOption,
    WorkdirOption,
)
from voxdino.cli.output import end, format_seconds, relative, say


def pretrain(
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="adapt, anchored, meddinov3 or distil; default: adapt, or distil.")
    ] = None,
    backbone: BackboneOption = None,
    teacher: Annotated[
        list[str] | None, typer.Option("--teacher", help="Distil from these weights (several: an ensemble).")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Of the whole; stages keep their shares.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images a step, of all processes together.")
    ] = None,
    probe: Annotated[
        Path | None, typer.Option("--probe", help="Workdir of prepared labelled cases to look at on the way.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--knn", help="MedMNIST .npz of classified pictures to look at on the way.")
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option("--stop-after", help="Leave off after 9m, say; the same command goes on.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run; default: the recipe.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only continue; refuse to start anew.")] = False,
    set_: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Pretrain a backbone on the pool of --workdir. Run it again to continue; under torchrun on many GPUs."""
    from voxdino.cli.steps import at_hand
    from voxdino.cli.values import parse_settings, parse_time_budget, run_folder_of
    from voxdino.models.registry import look_up
    from voxdino.preparation.classification import open_classification_set
    from voxdino.pretraining.recipes import PRETRAININGS, resized, with_teachers
    from voxdino.pretraining.run import TEACHER
    from voxdino.pretraining.run import pretrain as teach
    from voxdino.pretraining.watch import Probes

    config = look_up(PRETRAININGS, recipe or ("distil" if teacher else "adapt"), kind="recipe")()
    config = with_teachers(config, teacher or ())
    settings = parse_settings(set_)
    if "backbone" not in settings:
        backbone = backbone or at_hand(config.backbone)
    changes = {"backbone": backbone, "seed": seed}
    config = config.model_copy(update={key: value for key, value in changes.items() if value is not None})
    config = resized(config, num_steps=steps, batch_size=batch).with_settings(settings)
    run_folder = run_folder_of(workdir, name or config.recipe, config.recipe, 0)
    stages = ", ".join(f"{stage.name} {stage.num_steps} x {stage.batch_size}" for stage in config.stages)
    if dry_run:
        if not json:
            print(f"would pretrain {Path(config.backbone).stem}: {stages}; into {relative(run_folder)}")
        end({"run_folder": str(run_folder), "config": config.to_json()}, None, as_json=json)
        return
    say(f"{config.recipe}: {Path(config.backbone).stem}; stages (steps x images): {stages}")
    probes = Probes(pictures=open_classification_set(pictures) if pictures else None, workdir=probe)
    summary = teach(
        workdir,
        config,
        run_folder=run_folder,
        device=device,
        resume="require" if resume else "auto",
        stop_after_s=parse_time_budget(stop_after, "--stop-after"),
        probes=probes,
    )
    if int(os.environ.get("RANK", "0")):  # one of several processes tells
        return
    weights = relative(run_folder / TEACHER)
    if not json:
        done = "had ended before" if summary.was_finished else f"in {format_seconds(summary.elapsed_s)}"
        print(f"{relative(run_folder)}  {summary.num_steps} steps {done}; the backbone is {weights}")
        print(f"next: voxdino run DATASET --backbone {weights}")
    end(summary.to_json() | {"backbone": str(run_folder / TEACHER)}, None, as_json=json)
