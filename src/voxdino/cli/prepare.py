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
    ShardOption,
    StrictOption,
    TrustOption,
    WorkdirOption,
    WorkersOption,
)
from voxdino.cli.output import cohort_on, end, relative


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
    shard: ShardOption = None,
    strict: StrictOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Check a data set, plan for it and its backbone, and write the prepared cases. Run it again to continue."""
    from voxdino.cli.steps import plan_dataset, plan_for_shards, prepare_planned, print_plan
    from voxdino.cli.values import plan_settings, read_options
    from voxdino.core.shards import Shard
    from voxdino.preparation.plan import DEFAULT_BACKBONE
    from voxdino.preparation.workers import run_over_cases

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
    part = None if shard is None else Shard.parse(shard)
    over_cases = run_over_cases if on is None else cohort_on(on, "cpu").over_cases
    make_plan = plan_dataset if part is None or dry_run else plan_for_shards
    planned = make_plan(
        dataset,
        workdir,
        options=options,
        backbone=backbone or DEFAULT_BACKBONE,
        settings=plan_settings(set_, seed),
        strict=strict,
        num_workers=workers,
        over_cases=over_cases,
    )
    if not dry_run:
        prepare_planned(planned, workdir, num_workers=workers, shard=part, over_cases=over_cases)
    result = {"workdir": str(workdir), "plan": planned.plan.to_json(), "check": planned.report.to_json()}
    if not json:
        print_plan(planned)
        then = "voxdino finetune" if part is None else "the same command without --shard, when all shards are done"
        print("nothing was written" if dry_run else f"all of it is in {relative(workdir)}; next: {then}")
    end(result, planned.set_aside, as_json=json)
