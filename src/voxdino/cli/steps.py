"""The steps that `prepare`, `finetune`, `run` and `demo` share; what they did is said on stderr."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voxdino.cli.findings import first_error, print_findings
from voxdino.cli.options import AUTO
from voxdino.cli.output import counting, format_seconds, relative, say
from voxdino.core.errors import PartialError, UsageError
from voxdino.core.io import image_files
from voxdino.core.io.options import ReadOptions
from voxdino.core.locks import lock_folder
from voxdino.core.safe_files import digest_json, read_json, write_json
from voxdino.core.shards import Shard
from voxdino.preparation.case import Dataset, Split
from voxdino.preparation.check import CheckReport, survey
from voxdino.preparation.dataset import read_case, read_dataset
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.memory import BackboneProbe
from voxdino.preparation.plan import DEFAULT_BACKBONE, Plan, make_plan
from voxdino.preparation.prepare import PREPARED, prepare
from voxdino.preparation.splits import make_splits
from voxdino.preparation.workers import OverCases, run_over_cases

if TYPE_CHECKING:  # torch stays out of the process that prepares
    from voxdino.finetuning.config import FinetuneConfig


CHECK, FINGERPRINT, SURVEYED = "check.json", "fingerprint.json", "surveyed.json"
CHECK_PICTURE, MAX_PICTURED = "check.png", 4
PLANNED_FOR = "segdino_v2"  # before `auto` has chosen
_WAIT_FOR_PLAN_S = 24 * 3600.0  # while another shard reads all files


@dataclass(frozen=True)
class Planned:
    """A data set that was checked and planned for.

    dataset: with its usable cases only.   set_aside: the error of the cases that are not usable, if any.
    kept:    the plan was there already, made for these files and with these settings in it.
    files:   what tells whether a file has changed since: see `_state_of`.
    """

    dataset: Dataset
    report: CheckReport
    fingerprint: Fingerprint
    plan: Plan
    splits: tuple[Split, ...]
    set_aside: PartialError | None
    kept: bool
    files: str


def plan_dataset(
    path: Path,
    workdir: Path,
    *,
    options: ReadOptions,
    backbone: str,
    settings: Mapping[str, str],
    strict: bool,
    num_workers: int | None,
    over_cases: OverCases = run_over_cases,
    believe: bool = False,
) -> Planned:
    """Check a data set and decide everything about it; writes nothing.

    over_cases: where the files are read.   believe: what an earlier call has written to `workdir` about these files is
    not looked at again, while none of them has changed.

    A plan.json in `workdir` is kept, edits and all, while it is for these files and says what `settings` say; else
    it is said which of its values change.
    Errors: those of the data set; with `strict` the first bad case's too.
    """
    dataset = read_dataset(path, options)
    files = _state_of(dataset)
    with BackboneProbe(backbone) as probe:  # torch loads in its process while this one reads the files
        with counting("checking") as on_progress:
            known = _earlier_survey(dataset, workdir, files) if believe else None
            report, fingerprint = known or survey(
                dataset, num_workers=num_workers, over_cases=over_cases, on_progress=on_progress
            )
        error = first_error(report, path)
        usable = {case.id for case in fingerprint.cases}
        if error is not None and (strict or not usable or any(e.where == report.dataset for e in report.errors)):
            raise error
        dataset = dataset.without({case.id for case in dataset.cases} - usable)
        earlier = Plan.read(workdir / "plan.json") if (workdir / "plan.json").is_file() else None
        if earlier is not None and _still_holds(earlier, fingerprint, settings, probe.describe().patch_size):
            plan, kept = earlier, True
        else:
            plan, kept = make_plan(fingerprint, dataset, settings=settings, memory=probe), False
    if earlier is not None and not kept:
        say(f"the plan is made anew: {_changes(earlier, plan)}")
    splits = make_splits(dataset, num_folds=plan.num_folds, seed=plan.seed)
    set_aside = None
    if error is not None:
        fact = f"{report.bad_cases} of {report.num_cases} cases were set aside; first {error.where}: {error.fact}"
        set_aside = PartialError(fact, where=path, fix=error.fix)
    return Planned(dataset, report, fingerprint, plan, splits, set_aside, kept, files)


def plan_for_shards(path: Path, workdir: Path, **how: Any) -> Planned:
    """As `plan_dataset`, once for all shards: the first one writes down what it found, the others wait and read it.

    Preparing compares every file with the digest that is written there.
    """
    with lock_folder(workdir, part="plan", wait_s=_WAIT_FOR_PLAN_S, on_wait=say):
        planned = plan_dataset(path, workdir, believe=True, **how)
        _write_planned(planned, workdir)
    return planned


def _earlier_survey(dataset: Dataset, workdir: Path, files: str) -> tuple[CheckReport, Fingerprint] | None:
    """What is written about the same cases and files, to be read in the same way; None where it is not."""
    if not all((workdir / name).is_file() for name in (CHECK, FINGERPRINT, SURVEYED)):
        return None
    report, fingerprint = CheckReport.read(workdir / CHECK), Fingerprint.read(workdir / FINGERPRINT)
    same = (
        read_json(workdir / SURVEYED) == {"files": files}
        and (fingerprint.dataset, fingerprint.read_options) == (dataset.name, dataset.options)
        and fingerprint.channels == dataset.channels
        and dataset.labels in (None, fingerprint.labels)
    )
    return (report, fingerprint) if same else None


def _state_of(dataset: Dataset) -> str:
    """Digest of the names, sizes and times of all files of the cases; none is read."""
    return digest_json(
        [
            [
                case.id,
                [[dataset.name_of(file), *_size_and_time(file)] for path in case.files for file in image_files(path)],
            ]
            for case in dataset.cases
        ]
    )


def _size_and_time(file: Path) -> tuple[int, ...]:
    """In bytes and ns; () of a file that is not there."""
    with suppress(OSError):
        status = file.stat()
        return status.st_size, status.st_mtime_ns
    return ()


def _still_holds(plan: Plan, fingerprint: Fingerprint, settings: Mapping[str, str], patch_size: int) -> bool:
    """The plan was made for these facts and this backbone, and `settings` change nothing in it."""
    made_for = (plan.fingerprint_digest, plan.patch_size)
    return made_for == (fingerprint.digest(), patch_size) and plan.with_settings(settings) == plan


def _changes(earlier: Plan, plan: Plan) -> str:
    """ "seed 0 -> 7, crop [48, 32] -> [64, 64]": the decisions that differ."""
    old, new = earlier.to_json(), plan.to_json()
    told = ["the data set or the way it is read"] if earlier.fingerprint_digest != plan.fingerprint_digest else []
    names = [name for name in new if name not in ("fingerprint_digest", "reasons") and old[name] != new[name]]
    told += [f"{name} {json.dumps(old[name])} -> {json.dumps(new[name])}" for name in names]
    return ", ".join(told) or "with the same values"


def _write_planned(planned: Planned, workdir: Path) -> None:
    """All that was found and decided. Errors: UsageError where `workdir` is another set's."""
    _require_own(workdir, planned.fingerprint)
    path = workdir / "plan.json"
    if planned.kept:
        say(f"{relative(path)} is kept as it is; delete it to plan anew")
    planned.report.write(workdir / CHECK)
    planned.fingerprint.write(workdir / FINGERPRINT)
    if not planned.kept:
        planned.plan.write(path)
    write_json(workdir / "splits.json", [split.to_json() for split in planned.splits])
    write_json(workdir / SURVEYED, {"files": planned.files})  # last: it vouches for the others


def prepare_planned(
    planned: Planned,
    workdir: Path,
    *,
    num_workers: int | None,
    shard: Shard | None = None,
    over_cases: OverCases = run_over_cases,
) -> None:
    """Write the plan, what it was made from, and the prepared cases to `workdir`.

    shard: only this part of the cases; the rest is there (`plan_for_shards`).   over_cases: where they are prepared.
    Errors: UsageError where the folder holds the work on another data set.
    """
    if shard is None:
        with lock_folder(workdir), lock_folder(workdir / PREPARED):  # refused before a plan changes under shards
            _write_planned(planned, workdir)
    with counting("preparing", tell=over_cases is not run_over_cases) as on_progress:
        summary = prepare(
            planned.dataset,
            planned.plan,
            workdir.absolute(),
            num_workers=num_workers,
            shard=shard,
            over_cases=over_cases,
            on_progress=on_progress,
        )
    kept = f", {summary.num_kept} were there already" if summary.num_kept else ""
    say(f"{summary.num_prepared} cases prepared in {format_seconds(summary.elapsed_s)}{kept}")
    if shard is None and (not planned.kept or not (workdir / CHECK_PICTURE).is_file()):
        _draw_check(planned, workdir)


def _draw_check(planned: Planned, workdir: Path) -> None:
    """A few cases, image beside labels: a label map that is mirrored against its image passes every other check."""
    from voxdino.evaluation.pictures import overlay_grid  # matplotlib

    plan, cases = planned.plan, planned.dataset.cases
    chosen = [cases[round(place)] for place in np.linspace(0, len(cases) - 1, min(MAX_PICTURED, len(cases)))]
    rows = []
    for case in chosen:
        volume, reference = read_case(case, plan.read_options, plan.labels)
        if reference is not None:
            rows.append((case.id, volume, reference, None))
    if rows:
        overlay_grid(workdir / CHECK_PICTURE, rows, plan.labels, slice_axis=plan.slice_axis or "S")
        say(f"do the labels lie where they should? See {relative(workdir / CHECK_PICTURE)}")


def _require_own(workdir: Path, fingerprint: Fingerprint) -> None:
    """UsageError where `workdir` is another data set's: another name, or not one case in common."""
    path = workdir / FINGERPRINT
    if not path.is_file():
        return
    earlier = Fingerprint.read(path)
    common = {case.id for case in earlier.cases} & {case.id for case in fingerprint.cases}
    if earlier.dataset != fingerprint.dataset or not common:
        other = "another data set of that name" if earlier.dataset == fingerprint.dataset else f"'{earlier.dataset}'"
        fact = f"holds the work on {other}, not on '{fingerprint.dataset}'."
        raise UsageError(fact, where=workdir, fix="choose another --workdir.")


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


def choose(
    recipe: str,
    fingerprint: Fingerprint,
    plan: Plan,
    num_train: int,
    device: str,
    backbone: str | None,
    settings: Mapping[str, str],
) -> tuple[str, dict[str, str]]:
    """The recipe's name and settings; for `auto` those that suit data set, backbone and device, the reason on stderr.

    num_train: cases to train on, if `settings` do not say fewer.
    """
    if recipe != AUTO:
        return recipe, dict(settings)
    from voxdino.finetuning.choose import choose_recipe
    from voxdino.models.precision import device_memory, resolve_device
    from voxdino.models.weights import load_backbone

    asked = resolve_config(PLANNED_FOR, backbone=backbone, settings=settings)
    choice = choose_recipe(
        fingerprint,
        plan,
        num_train=min(num_train, asked.num_train_cases or num_train),
        memory_bytes=device_memory(resolve_device(device)),
        abilities=load_backbone(asked.backbone)[0].abilities,
    )
    say(f"recipe {choice.recipe}: {choice.reason}")
    return choice.recipe, {**choice.settings, **settings}


def planning_backbone(recipe: str, backbone: str | None, settings: Mapping[str, str]) -> str:
    """The backbone to plan for, before `auto` has chosen; all recipes that have one share their default."""
    known = PLANNED_FOR if recipe == AUTO else recipe
    name = resolve_config(known, backbone=backbone, settings=settings).backbone
    return DEFAULT_BACKBONE if name == "none" else name


def resolve_config(
    recipe: str,
    *,
    backbone: str | None = None,
    epochs: int | None = None,
    time_budget_s: float | None = None,
    seed: int | None = None,
    workers: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> "FinetuneConfig":
    """The recipe with what the command line changes; `--set` comes last.

    Errors: UsageError for unknown recipes and settings, with the nearest known name.
    """
    from voxdino.finetuning.recipes import RECIPES
    from voxdino.models.registry import look_up

    given = {
        "backbone": backbone,
        "num_epochs": epochs,
        "time_budget_s": time_budget_s,
        "seed": seed,
        "num_workers": workers,
    }
    config = look_up(RECIPES, recipe, kind="recipe")()
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    if backbone is None and "backbone" not in (settings or {}):
        config = config.model_copy(update={"backbone": at_hand(config.backbone)})
    if epochs is not None and config.first is not None:
        config = config.model_copy(update={"first": config.first.model_copy(update={"num_epochs": epochs})})
    return config.with_settings(settings or {})


@cache
def at_hand(backbone: str) -> str:
    """This backbone; for the default one, where its weights are not here, the one inside the package: said once."""
    from voxdino.models.weights import BUILT_IN, is_here

    if backbone != DEFAULT_BACKBONE or is_here(backbone):
        return backbone
    say(
        f"backbone {BUILT_IN}: the small one that comes with voxdino, since {DEFAULT_BACKBONE} is not here; "
        f"for better results: voxdino weights pull {DEFAULT_BACKBONE}"
    )
    return BUILT_IN


def describe_config(config: "FinetuneConfig") -> str:
    """ "segdino_v2: dinov2_vits14, frozen, decoder tpa_sad, 50 epochs"."""
    length = f"{config.num_epochs} epochs"
    if config.time_budget_s is not None:
        length += f" or {format_seconds(config.time_budget_s)}"
    parts: Sequence[str] = (Path(config.backbone).stem, config.adaptation, f"decoder {config.decoder}", length)
    return f"{config.recipe}: {', '.join(parts)}"
