"""`voxdino finetune`: adapt a backbone to the prepared cases."""

from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import (
    AUTO,
    DEFAULT_WORKDIR,
    BackboneOption,
    Device,
    DeviceOption,
    DryRunOption,
    EpochsOption,
    FoldOption,
    JsonOption,
    RecipeOption,
    SeedOption,
    SetOption,
    TimeBudgetOption,
    WorkdirOption,
    WorkersOption,
)
from voxdino.cli.output import end, format_seconds, relative, say
from voxdino.core.errors import DatasetError


def finetune(
    workdir: WorkdirOption = DEFAULT_WORKDIR,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="SET", help="Classify: a .npz set, or a folder with labels.csv. No prepare."),
    ] = None,
    recipe: RecipeOption = AUTO,
    backbone: BackboneOption = None,
    fold: FoldOption = 0,
    epochs: EpochsOption = None,
    time_budget: TimeBudgetOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run; default: RECIPE_foldN.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only continue; refuse to start anew.")] = False,
    set_: SetOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune on one fold of the prepared cases. Run it again to continue; Ctrl-C stops at a safe point."""
    from voxdino.cli.steps import choose, describe_config, resolve_config
    from voxdino.cli.values import finetune_settings, parse_time_budget, run_folder_of
    from voxdino.finetuning.run import finetune as adapt
    from voxdino.preparation.fingerprint import Fingerprint
    from voxdino.preparation.plan import Plan
    from voxdino.preparation.splits import read_split

    if data is not None:
        from voxdino.cli.classify import finetune_set

        given = {"backbone": backbone, "num_epochs": epochs, "time_budget_s": parse_time_budget(time_budget)}
        given |= {"seed": seed, "num_workers": workers}
        finetune_set(
            data,
            run_folder_of(workdir, name, recipe if recipe != AUTO else "classify_linear", fold),
            recipe=recipe,
            given=given,
            settings=finetune_settings(set_),
            device=device,
            dry_run=dry_run,
            json=json,
        )
        return
    if not (workdir / "plan.json").is_file():
        fix = "voxdino prepare DATASET first, with the same --workdir."
        raise DatasetError("no plan.json here: nothing is prepared.", where=workdir, fix=fix)
    settings = finetune_settings(set_)
    if recipe == AUTO:
        num_train = len(read_split(workdir / "splits.json", fold).train)
        facts = Fingerprint.read(workdir / "fingerprint.json")
        plan = Plan.read(workdir / "plan.json")
        recipe, settings = choose(recipe, facts, plan, num_train, device, backbone, settings)
    config = resolve_config(
        recipe,
        backbone=backbone,
        epochs=epochs,
        time_budget_s=parse_time_budget(time_budget),
        seed=seed,
        workers=workers,
        settings=settings,
    )
    run_folder = run_folder_of(workdir, name, recipe, fold)
    if dry_run:
        if not json:
            print(f"would fine-tune {describe_config(config)}, fold {fold}, into {relative(run_folder)}")
        end({"run_folder": str(run_folder), "config": config.to_json()}, None, as_json=json)
        return
    say(f"{describe_config(config)}, fold {fold}")
    summary = adapt(
        workdir,
        config,
        run_folder=run_folder,
        fold=fold,
        device=device,
        resume="require" if resume else "auto",
    )
    if not json:
        was = "was finished before" if summary.was_finished else f"ended by {summary.ended_by}"
        print(
            f"{relative(run_folder)}  {summary.num_steps} steps in {format_seconds(summary.elapsed_s)}, {was}; "
            f"best validation Dice {summary.best_dice:.3f} (step {summary.best_step})"
        )
        print(f"next: voxdino predict IMAGE... --run {relative(run_folder)} --out FOLDER")
    end(summary.to_json(), None, as_json=json)
