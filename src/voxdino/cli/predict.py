"""`voxdino predict`: label maps of new cases, on their own grids, with their own headers."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import Device, DeviceOption, DryRunOption, JsonOption, NanOption, NanPolicy, StrictOption
from voxdino.cli.output import counting, end, say


def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    run: Annotated[Path, typer.Option("--run", "-r", help="The run folder of a fine-tuned model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the label maps, each named after its case.")],
    mirror: Annotated[bool, typer.Option("--mirror", help="Average mirror images: four times the work.")] = False,
    overlap: Annotated[float, typer.Option("--overlap", min=0.0, max=0.9, help="Share that tiles share.")] = 0.5,
    nan_policy: NanOption = NanPolicy.refuse,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the predictions of another model.")] = False,
    strict: StrictOption = False,
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Segment images with a fine-tuned model. Run it again to continue; finished cases are kept."""
    from voxdino.inference.cases import find_cases

    cases = find_cases(inputs)
    if dry_run:
        _say_what(cases_of=[(case.id, case.images) for case in cases], run=run, out=out)
        return
    from voxdino.cli.summaries import partial_result, print_predictions
    from voxdino.core.errors import PartialError
    from voxdino.inference.load import load_model
    from voxdino.inference.predictor import PredictSettings
    from voxdino.inference.run import predict_cases
    from voxdino.training.precision import resolve_device

    model = load_model(run, resolve_device(device))
    say(f"{len(cases)} cases with {model.name} on {model.device} ({model.card.backbone.name}, {model.card.licence})")
    options = model.plan.read_options
    if nan_policy is NanPolicy.fill:
        options = options.model_copy(update={"nan_policy": "fill"})
    with counting("predicting") as on_progress:
        try:
            summary = predict_cases(
                cases,
                model,
                out,
                settings=PredictSettings(mirror=mirror, overlap=overlap),
                options=options,
                strict=strict,
                overwrite=overwrite,
                on_progress=on_progress,
            )
        except PartialError as error:
            end(partial_result(out), error, as_json=json)
            return
    if not json:
        print_predictions(summary, cases)
    end(summary.to_json(), None, as_json=json)


def _say_what(cases_of: list[tuple[str, tuple[Path, ...]]], run: Path, out: Path) -> None:
    from voxdino.core.geometry import format_shape, format_spacing
    from voxdino.core.io import read_grid

    for case, images in cases_of[:MAX_LINES]:
        grid, _ = read_grid(images[0])
        print(f"{case}  {format_shape(grid.shape)} at {format_spacing(grid.spacing, grid.unit)}")
    more = f" (the first {MAX_LINES} are listed)" if len(cases_of) > MAX_LINES else ""
    print(f"would predict {len(cases_of)} cases with {run} into {out}{more}; nothing was written")
