"""`voxdino predict`: label maps of new cases, on their own grids, with their own headers."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voxdino.cli.options import (
    Device,
    DeviceOption,
    DryRunOption,
    JsonOption,
    NanOption,
    NanPolicy,
    OnOption,
    SeriesOption,
    ShardOption,
    StrictOption,
)
from voxdino.cli.output import cohort_on, counting, end, say

if TYPE_CHECKING:
    from voxdino.inference.segmenting import Announced
    from voxdino.inference.settings import PredictSettings

MOST_MAGNIFIED = 8.0
DEFAULT_OVERLAP = 0.25


class Gate(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


class Amp(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    off = "off"


def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    run: Annotated[
        list[Path], typer.Option("--run", "-r", help="The run folder of a fine-tuned model; several vote (folds).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the label maps, each named after its case.")],
    mirror: Annotated[bool, typer.Option("--mirror", help="Average mirror images: four times the work.")] = False,
    overlap: Annotated[
        float, typer.Option("--overlap", min=0.0, max=0.9, help="Share that tiles share.")
    ] = DEFAULT_OVERLAP,
    second_look: Annotated[
        float | None, typer.Option("--second-look", help="Look again at small candidates, so many times magnified: 2.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Tiles side by side; voxdino tune measures the cost.")] = False,
    localise: Annotated[
        Path | None, typer.Option("--localise", help="A run whose findings are the box that is looked into.")
    ] = None,
    gate: Annotated[
        Gate, typer.Option("--gate", help="Skip air: auto in CT; on, other images' black too; off, nothing.")
    ] = Gate.auto,
    clean_up: Annotated[
        bool, typer.Option("--clean-up/--no-clean-up", help="As voxdino tune chose for the (first) run.")
    ] = True,
    tiles_at_once: Annotated[
        int | None, typer.Option("--tiles-at-once", min=1, help="Per pass of the network; fewer take less memory.")
    ] = None,
    amp: Annotated[Amp, typer.Option("--amp", help="bfloat16 arithmetic; auto: where the hardware has it.")] = Amp.auto,
    output_format: Annotated[
        str | None,
        typer.Option("--format", help="nifti, nrrd, mha, png, dicom-seg, rtstruct; default: the image's own format."),
    ] = None,
    keep_patient: Annotated[
        bool, typer.Option("--keep-patient", help="Copy the patient of DICOM images into DICOM output.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Keep the probabilities too, as CASE.probabilities.b2nd.")
    ] = False,
    volumes: Annotated[
        Path | None, typer.Option("--volumes", help="Table of the volumes of all cases: a .csv or .json file.")
    ] = None,
    on: OnOption = None,
    shard: ShardOption = None,
    nan_policy: NanOption = NanPolicy.refuse,
    series: SeriesOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the predictions of another model.")] = False,
    strict: StrictOption = False,
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Segment (or classify) images with a fine-tuned model. Run it again to continue; finished cases are kept."""
    from voxdino.cli.summaries import partial_result, print_inputs, print_predictions
    from voxdino.core.errors import PartialError, UsageError
    from voxdino.core.shards import Shard
    from voxdino.inference.cases import find_cases, num_source_channels
    from voxdino.inference.choose import is_classifier, load_segmenting, plan_of
    from voxdino.inference.outputs import OutputSettings, require_volumes_file, write_volumes

    if is_classifier(run[0]):
        from voxdino.cli.classify import classify, require_none

        if len(run) > 1:
            raise UsageError("classifiers do not vote", where="--run", fix="give one run, and average the tables.")
        surplus = {
            "--mirror": mirror,
            "--overlap": overlap != DEFAULT_OVERLAP,
            "--second-look": second_look is not None,
            "--fast": fast,
            "--localise": localise,
            "--gate": gate is not Gate.auto,
            "--no-clean-up": not clean_up,
            "--tiles-at-once": tiles_at_once,
            "--amp": amp is not Amp.auto,
            "--format": output_format,
            "--keep-patient": keep_patient,
            "--probabilities": probabilities,
            "--volumes": volumes,
            "--on": on,
            "--shard": shard,
            "--nan-policy": nan_policy is not NanPolicy.refuse,
            "--series": series,
            "--overwrite": overwrite,
        }
        require_none(surplus, "is for segmentation; this run classifies.")
        classify(inputs, run[0], out, strict=strict, device=device, dry_run=dry_run, json=json)
        return
    output = OutputSettings(format=output_format, keep_patient=keep_patient, probabilities=probabilities)
    if volumes is not None:
        require_volumes_file(volumes)
    cases = find_cases(inputs, num_channels=num_source_channels(plan_of(run[0])), series=series)
    part = None if shard is None else Shard.parse(shard)
    if part is not None:
        cases = part.of(cases)
        if not cases:
            say(f"shard {shard} has no case: there are fewer cases than shards")
            end({"cases": []}, None, as_json=json)
            return
    if dry_run:
        if not json:
            print_inputs(cases)
            print(f"would predict {len(cases)} cases with {', '.join(map(str, run))} into {out}")
        end({"cases": [case.id for case in cases]}, None, as_json=json)
        return
    from voxdino.inference.ledger import PredictRecord, record_name
    from voxdino.inference.run import predict_cases
    from voxdino.inference.settings import PredictSettings

    if second_look is not None and not 1 < second_look <= MOST_MAGNIFIED:
        fix = f"give a number above 1 and up to {MOST_MAGNIFIED:g}, such as 2."
        raise UsageError(f"--second-look is {second_look:g}", fix=fix)
    settings = PredictSettings(
        mirror=mirror,
        overlap=overlap,
        second_look=second_look,
        slices_at_once=tiles_at_once,
        amp=amp.value,
        gate=gate.value,
    )
    team = load_segmenting(run, localise=localise, clean_up=clean_up, device=device.value)
    if fast:
        settings = _hasty(settings, run[0])
    _require_magnifiable(second_look, team)
    _say_how(team, settings, len(cases))
    options = team.plan.read_options
    if nan_policy is NanPolicy.fill:
        options = options.model_copy(update={"nan_policy": "fill"})
    spread = None
    if on is not None:
        from voxdino.cohort.predicting import Models, Spread
        from voxdino.models.precision import resolve_device

        models = Models(tuple(one.absolute() for one in run), localise and localise.absolute(), clean_up, device.value)
        spread = Spread(cohort_on(on, resolve_device(device.value).type), models)
    with counting("predicting", tell=on is not None) as on_progress:
        try:
            summary = predict_cases(
                cases,
                team,
                out,
                settings=settings,
                options=options,
                output=output,
                strict=strict,
                overwrite=overwrite,
                shard=part,
                spread=spread,
                on_progress=on_progress,
                on_note=say,
            )
        except PartialError as error:
            if volumes is not None:
                write_volumes(volumes, PredictRecord.read(out / record_name(part)).list_volumes())
            end(partial_result(out, part), error, as_json=json)
            return
    if volumes is not None:
        write_volumes(volumes, summary.record.list_volumes())
    if not json:
        print_predictions(summary, cases)
    end(summary.to_json(), None, as_json=json)


def _hasty(settings: "PredictSettings", run: Path) -> "PredictSettings":
    """With what --fast changes, and its cost told."""
    from voxdino.core.errors import UsageError
    from voxdino.inference.settings import FAST_NAME, FastCost, hasty

    if settings.mirror or settings.second_look is not None:
        raise UsageError("--fast goes with neither --mirror nor --second-look", fix="leave one of them out.")
    cost = run / FAST_NAME
    say(FastCost.read(cost).in_words() if cost.is_file() else "--fast: its cost is not measured; see voxdino tune")
    return hasty(settings)


def _require_magnifiable(second_look: float | None, team: "Announced") -> None:
    from voxdino.core.errors import UsageError

    if second_look is not None and not team.magnifies:
        raise UsageError("--second-look magnifies what a backbone sees, and this model has none", fix="leave it out.")


def _say_how(team: "Announced", settings: "PredictSettings", num_cases: int) -> None:
    """On stderr: who predicts, what is skipped, what is cleaned up."""
    from voxdino.inference.gate import is_gated

    for who in team.who:
        say(f"{num_cases} cases with {who}")
    if is_gated(team.plan, settings.gate):
        say("air around the body is not looked at (--gate off)")
    if team.after.rules:
        say(f"cleaned up afterwards: {', '.join(team.after.rules)} (--no-clean-up)")
