"""`voxdino prepare`: check, fingerprint, plan, splits and prepared cases, in one parallel pass over the files each."""

from voxdino.cli.options import (
    DEFAULT_WORKDIR,
    BackboneOption,
    DatasetArgument,
    DryRunOption,
    ExternalOption,
    GeometryOption,
    JsonOption,
    LossyOption,
    MapOption,
    NanOption,
    NanPolicy,
    OnOption,
    SeedOption,
    SegmentOption,
    SeriesOption,
    SetOption,
    StrictOption,
    TrustOption,
    WorkdirOption,
    WorkersOption,
)
from voxdino.cli.output import end, relative


def prepare(
    dataset: DatasetArgument,
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    backbone: BackboneOption = None,
    map_: MapOption = None,
    lossy_labels: LossyOption = None,
    nan_policy: NanOption = NanPolicy.refuse,
    geometry_tol: GeometryOption = None,
    trust_array_order: TrustOption = False,
    allow_external: ExternalOption = False,
    series: SeriesOption = None,
    segment: SegmentOption = None,
    set_: SetOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    on: OnOption = None,
    strict: StrictOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Check a data set, plan for it and its backbone, and write the prepared cases. Run it again to continue."""
    from voxdino.cli.steps import plan_dataset, prepare_planned, print_plan
    from voxdino.cli.values import plan_settings, read_options
    from voxdino.preparation.plan import DEFAULT_BACKBONE

    options = read_options(
        label_map=map_,
        lossy_labels=lossy_labels,
        nan_policy=nan_policy,
        geometry_tol=geometry_tol,
        trust_array_order=trust_array_order,
        allow_external=allow_external,
        series=series,
        segments=segment,
    )
    planned = plan_dataset(
        dataset,
        workdir,
        options=options,
        backbone=backbone or DEFAULT_BACKBONE,
        settings=plan_settings(set_, seed),
        strict=strict,
        num_workers=workers,
    )
    if not dry_run:
        prepare_planned(planned, workdir, num_workers=workers, on=on)
    result = {"workdir": str(workdir), "plan": planned.plan.to_json(), "check": planned.report.to_json()}
    if not json:
        print_plan(planned)
        print("nothing was written" if dry_run else f"all of it is in {relative(workdir)}; next: voxdino finetune")
    end(result, planned.set_aside, as_json=json)
