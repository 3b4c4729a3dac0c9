"""The steps that `prepare`, `finetune`, `run` and `demo` share; what they did is said on stderr."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from voxdino.cli.findings import first_error, print_findings
from voxdino.cli.output import counting, format_seconds, relative, say
from voxdino.core.errors import PartialError, UsageError
from voxdino.core.io.options import ReadOptions
from voxdino.core.safe_files import lock_folder, write_json
from voxdino.finetuning.config import FinetuneConfig
from voxdino.finetuning.recipes import RECIPES
from voxdino.models.registry import look_up
from voxdino.preparation.case import Dataset, Split
from voxdino.preparation.check import CheckReport, survey
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.memory import BackboneProbe
from voxdino.preparation.plan import Plan, make_plan
from voxdino.preparation.prepare import prepare
from voxdino.preparation.splits import make_splits


@dataclass(frozen=True)
class Planned:
    """A data set that was checked and planned for.

    dataset: with its usable cases only.   set_aside: the error of the cases that are not usable, if any.
    kept:    the plan was there already, made for these files.
    """

    dataset: Dataset
    report: CheckReport
    fingerprint: Fingerprint
    plan: Plan
    splits: tuple[Split, ...]
    set_aside: PartialError | None
    kept: bool


def plan_dataset(
    path: Path,
    workdir: Path,
    *,
    options: ReadOptions,
    backbone: str,
    settings: Mapping[str, str],
    strict: bool,
    num_workers: int | None,
) -> Planned:
    """Check a data set and decide everything about it; writes nothing.

    A plan.json in `workdir` is kept, edits and all, while it is for these files and nothing is set anew.
    Errors: those of the data set; with `strict` the first bad case's too.
    """
    dataset = read_dataset(path, options)
    with BackboneProbe(backbone) as probe:  # torch loads in its process while this one reads the files
        with counting("checking") as on_progress:
            report, fingerprint = survey(dataset, num_workers=num_workers, on_progress=on_progress)
        error = first_error(report, path)
        usable = {case.id for case in fingerprint.cases}
        if error is not None and (strict or not usable or any(e.where == report.dataset for e in report.errors)):
            raise error
        dataset = _keep(dataset, usable)
        plan, kept = _earlier_plan(workdir, fingerprint, settings, probe.describe().patch_size), True
        if plan is None:
            plan, kept = make_plan(fingerprint, dataset, settings=settings, memory=probe), False
    splits = make_splits(dataset, num_folds=plan.num_folds, seed=plan.seed)
    set_aside = None
    if error is not None:
        fact = f"{report.bad_cases} of {report.num_cases} cases were set aside; first {error.where}: {error.fact}"
        set_aside = PartialError(fact, where=path, fix=error.fix)
    return Planned(dataset, report, fingerprint, plan, splits, set_aside, kept)


def _keep(dataset: Dataset, usable: set[str]) -> Dataset:
    """The data set without the cases that cannot be used, its own splits included."""
    splits = dataset.splits and tuple(
        Split(train=tuple(i for i in s.train if i in usable), val=tuple(i for i in s.val if i in usable))
        for s in dataset.splits
    )
    return replace(dataset, cases=tuple(case for case in dataset.cases if case.id in usable), splits=splits)


def _earlier_plan(workdir: Path, fingerprint: Fingerprint, settings: Mapping[str, str], patch_size: int) -> Plan | None:
    path = workdir / "plan.json"
    if settings or not path.is_file():
        return None
    plan = Plan.read(path)
    return plan if (plan.fingerprint_digest, plan.patch_size) == (fingerprint.digest(), patch_size) else None


def prepare_planned(planned: Planned, workdir: Path, *, num_workers: int | None) -> None:
    """Write check.json, fingerprint.json, plan.json, splits.json and the prepared cases to `workdir`.

    Errors: UsageError where the folder holds the work on another data set.
    """
    earlier = workdir / "fingerprint.json"
    if earlier.is_file() and (name := Fingerprint.read(earlier).dataset) != planned.dataset.name:
        fact = f"holds the work on '{name}', not on '{planned.dataset.name}'."
        raise UsageError(fact, where=workdir, fix="choose another --workdir.")
    with lock_folder(workdir):
        planned.report.write(workdir / "check.json")
        planned.fingerprint.write(earlier)
        if planned.kept:
            say(f"plan.json is kept as it is; delete {relative(workdir / 'plan.json')} to plan anew")
        else:
            planned.plan.write(workdir / "plan.json")
        write_json(workdir / "splits.json", [split.to_json() for split in planned.splits])
    with counting("preparing") as on_progress:
        summary = prepare(planned.dataset, planned.plan, workdir, num_workers=num_workers, on_progress=on_progress)
    kept = f", {summary.num_kept} were there already" if summary.num_kept else ""
    say(f"{summary.num_prepared} cases prepared in {format_seconds(summary.elapsed_s)}{kept}")


def print_plan(planned: Planned) -> None:
    """The decisions that matter most, each with its reason, on stdout."""
    plan = planned.plan
    print_findings(planned.report)
    decided = {name: getattr(plan, name) for name in ("slice_axis", "in_plane_spacing", "magnification", "crop")}
    decided["input"] = f"{', '.join(channel.name for channel in plan.channels)} by {plan.input_builder}"
    decided["batch_size"] = plan.batch_size
    for name, value in decided.items():
        shown = " x ".join(map(str, value)) if isinstance(value, tuple) else value
        reason = plan.reasons.get("input_builder" if name == "input" else name, "")
        print(f"{name:<17} {shown}: {reason}")
    sizes = ", ".join(f"{len(split.train)} + {len(split.val)}" for split in planned.splits)
    print(f"{'splits':<17} {len(planned.splits)} (training + validation cases): {sizes}")


def resolve_config(
    recipe: str,
    *,
    backbone: str | None = None,
    epochs: int | None = None,
    time_budget_s: float | None = None,
    seed: int | None = None,
    workers: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> FinetuneConfig:
    """The recipe with what the command line changes; `--set` comes last.

    Errors: UsageError for unknown recipes and settings, with the nearest known name.
    """
    given = {
        "backbone": backbone,
        "num_epochs": epochs,
        "time_budget_s": time_budget_s,
        "seed": seed,
        "num_workers": workers,
    }
    config = look_up(RECIPES, recipe, kind="recipe")()
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    return config.with_settings(settings or {})


def describe_config(config: FinetuneConfig) -> str:
    """ "segdino_v2: dinov2_vits14, frozen, decoder tpa_sad, 50 epochs"."""
    length = f"{config.num_epochs} epochs"
    if config.time_budget_s is not None:
        length += f" or {format_seconds(config.time_budget_s)}"
    parts: Sequence[str] = (Path(config.backbone).stem, config.adaptation, f"decoder {config.decoder}", length)
    return f"{config.recipe}: {', '.join(parts)}"
