"""`voxdino run`: from a folder of scans to scored label maps in one command."""

from typing import Annotated

import typer

from voxdino.cli.options import (
    AUTO,
    DEFAULT_WORKDIR,
    BackboneOption,
    DatasetArgument,
    Device,
    DeviceOption,
    DryRunOption,
    EpochsOption,
    ExternalOption,
    FoldOption,
    GeometryOption,
    JsonOption,
    LesionsOption,
    LossyOption,
    MapOption,
    NanOption,
    NanPolicy,
    RecipeOption,
    SeedOption,
    SegmentOption,
    SeriesOption,
    SetOption,
    StrictOption,
    TimeBudgetOption,
    TrustOption,
    WorkdirOption,
    WorkersOption,
)
from voxdino.cli.output import end


def run(
    dataset: DatasetArgument,
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    recipe: RecipeOption = AUTO,
    backbone: BackboneOption = None,
    fold: FoldOption = 0,
    epochs: EpochsOption = None,
    time_budget: TimeBudgetOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run; default: RECIPE_foldN.")] = None,
    set_: SetOption = None,
    lesions: LesionsOption = False,
    map_: MapOption = None,
    lossy_labels: LossyOption = None,
    nan_policy: NanOption = NanPolicy.refuse,
    geometry_tol: GeometryOption = None,
    trust_array_order: TrustOption = False,
    allow_external: ExternalOption = False,
    series: SeriesOption = None,
    segment: SegmentOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    strict: StrictOption = False,
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Check, prepare, fine-tune, predict the validation fold and score it: one command. Run it again to continue."""
    import time

    started = time.monotonic()
    from voxdino.cli.steps import (
        choose,
        describe_config,
        plan_dataset,
        planning_backbone,
        print_plan,
        resolve_config,
    )
    from voxdino.cli.values import parse_time_budget, read_options, run_folder_of, split_settings

    budget_s = parse_time_budget(time_budget)
    plan_settings, settings = split_settings(set_)
    if seed is not None:
        plan_settings = {"seed": str(seed), **plan_settings}
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
        backbone=planning_backbone(recipe, backbone, settings),
        settings=plan_settings,
        strict=strict,
        num_workers=workers,
    )
    num_train = len(planned.splits[fold].train) if fold < len(planned.splits) else 0
    recipe, settings = choose(recipe, planned.fingerprint, planned.plan, num_train, device, backbone, settings)
    config = resolve_config(
        recipe, backbone=backbone, epochs=epochs, time_budget_s=budget_s, seed=seed, settings=settings
    )
    run_folder = run_folder_of(workdir, name, recipe, fold)
    if dry_run:
        from voxdino.finetuning.run import require_buildable
        from voxdino.models.weights import load_backbone

        require_buildable(config, planned.plan, load_backbone(config.backbone)[1], device)
        if not json:
            print_plan(planned)
            print(
                f"would prepare, fine-tune ({describe_config(config)}, fold {fold}), predict and score in {run_folder}"
            )
        end({"plan": planned.plan.to_json(), "config": config.to_json()}, planned.set_aside, as_json=json)
        return
    from voxdino.cli.budget import Budget
    from voxdino.cli.road import go, print_road

    road = go(
        planned,
        config,
        workdir=workdir,
        run_folder=run_folder,
        fold=fold,
        device=device,
        num_workers=workers,
        budget=Budget(budget_s, started),
        lesions=lesions,
    )
    if not json:
        print_road(road)
    end(road.to_json(), road.error(planned.set_aside), as_json=json)
