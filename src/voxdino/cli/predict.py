"""`voxdino predict`: label maps of new cases, on their own grids, with their own headers."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import Device, DeviceOption, DryRunOption, JsonOption, NanOption, NanPolicy, StrictOption
from voxdino.cli.output import counting, end, say

MOST_MAGNIFIED = 8.0


def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    run: Annotated[Path, typer.Option("--run", "-r", help="The run folder of a fine-tuned model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the label maps, each named after its case.")],
    mirror: Annotated[bool, typer.Option("--mirror", help="Average mirror images: four times the work.")] = False,
    overlap: Annotated[float, typer.Option("--overlap", min=0.0, max=0.9, help="Share that tiles share.")] = 0.5,
    second_look: Annotated[
        float | None, typer.Option("--second-look", help="Look again at small candidates, so many times magnified: 2.")
    ] = None,
    nan_policy: NanOption = NanPolicy.refuse,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the predictions of another model.")] = False,
    strict: StrictOption = False,
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Segment (or classify) images with a fine-tuned model. Run it again to continue; finished cases are kept."""
    from voxdino.cli.summaries import partial_result, print_inputs, print_predictions
    from voxdino.inference.cases import find_cases, num_source_channels
    from voxdino.inference.classify import is_classifier
    from voxdino.inference.load import load_plan

    if is_classifier(run):
        from voxdino.cli.classify import classify

        classify(inputs, run, out, strict=strict, device=device, dry_run=dry_run, json=json)
        return
    cases = find_cases(inputs, num_channels=num_source_channels(load_plan(run)))
    if dry_run:
        if not json:
            print_inputs(cases)
            print(f"would predict {len(cases)} cases with {run} into {out}")
        end({"cases": [case.id for case in cases]}, None, as_json=json)
        return
    from voxdino.core.errors import PartialError, UsageError
    from voxdino.inference.load import load_model
    from voxdino.inference.predictor import PredictSettings
    from voxdino.inference.run import predict_cases
    from voxdino.models.precision import resolve_device

    if second_look is not None and not 1 < second_look <= MOST_MAGNIFIED:
        fix = f"give a number above 1 and up to {MOST_MAGNIFIED:g}, such as 2."
        raise UsageError(f"--second-look is {second_look:g}", fix=fix)
    settings = PredictSettings(mirror=mirror, overlap=overlap, second_look=second_look)
    model = load_model(run, resolve_device(device))
    if second_look is not None and not model.segmenter.backbone.depth:
        raise UsageError("--second-look magnifies what a backbone sees, and this model has none", fix="leave it out.")
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
                settings=settings,
                options=options,
                strict=strict,
                overwrite=overwrite,
                on_progress=on_progress,
                on_note=say,
            )
        except PartialError as error:
            end(partial_result(out), error, as_json=json)
            return
    if not json:
        print_predictions(summary, cases)
    end(summary.to_json(), None, as_json=json)
