"""What the words of the options mean: text of the command line -> values of the library."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from voxdino.cli.options import NanPolicy
from voxdino.core.errors import UsageError
from voxdino.core.io.options import ReadOptions

PLAN_PREFIX = "plan."


def parse_time_budget(text: str | None, option: str = "--time-budget") -> float | None:
    """Seconds of "90", "45s", "10m", "1h30m".

    Errors: UsageError for anything else, zero included.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if seconds <= 0:
        raise UsageError(f"{text!r} is no length of time.", where=option, fix="write 90s, 10m or 1h30m.")
    return float(seconds)


def parse_settings(
    items: Sequence[str] | None, option: str = "--set", example: str = "learning_rate=1e-4"
) -> dict[str, str]:
    """The `--set KEY=VALUE` items, or those of another option of that form.

    Errors: UsageError where there is no "=", or one key comes twice.
    """
    settings: dict[str, str] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{item!r} is not KEY=VALUE.", where=option, fix=f"write {option} {example}.")
        if key in settings:
            raise UsageError(f"{key} is given twice.", where=option, fix="keep one of them.")
        settings[key] = value
    return settings


def split_settings(items: Sequence[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """The `--set` items as (settings of the plan, without their "plan.", settings of the fine-tuning)."""
    settings = parse_settings(items)
    plan = {key.removeprefix(PLAN_PREFIX): text for key, text in settings.items() if key.startswith(PLAN_PREFIX)}
    return plan, {key: text for key, text in settings.items() if not key.startswith(PLAN_PREFIX)}


def plan_settings(items: Sequence[str] | None, seed: int | None = None) -> dict[str, str]:
    """The settings of a command that only plans. Errors: UsageError for settings of the fine-tuning."""
    plan, others = split_settings(items)
    if others:
        name = next(iter(others))
        fix = f"write --set {PLAN_PREFIX}KEY=VALUE here; settings of the training belong to voxdino finetune."
        raise UsageError(f"'{name}' is no setting of the plan.", where="--set", fix=fix)
    return plan if seed is None else {"seed": str(seed), **plan}


def finetune_settings(items: Sequence[str] | None) -> dict[str, str]:
    """The settings of a command whose plan is made. Errors: UsageError for settings of the plan."""
    plan, others = split_settings(items)
    if plan:
        fact = f"'{PLAN_PREFIX}{next(iter(plan))}' cannot be set here: the cases are prepared."
        raise UsageError(fact, where="--set", fix="set it with voxdino prepare (or voxdino run).")
    return others


def run_folder_of(workdir: Path, name: str | None, recipe: str, fold: int) -> Path:
    """WORKDIR/runs/NAME. Errors: UsageError for a name that is no file name."""
    name = name or f"{recipe}_fold{fold}"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(
            f"{name!r} is no name for a run.", where="--name", fix="use letters, digits, '.', '_' and '-'."
        )
    return workdir / "runs" / name


def parse_label_map(items: Iterable[str] | None) -> tuple[tuple[int, int], ...]:
    """The `--map FROM=TO` items as pairs of ids.

    Errors: UsageError unless both are whole numbers, none negative, and each FROM comes once.
    """
    pairs: dict[int, int] = {}
    for item in items or ():
        match = re.fullmatch(r"\s*(\d+)\s*=\s*(\d+)\s*", item)
        if not match or int(match[1]) in pairs:
            fact = f"{item!r} is not FROM=TO." if not match else f"{match[1]} is mapped twice."
            raise UsageError(fact, where="--map", fix="write two label numbers, e.g. --map 255=1.")
        pairs[int(match[1])] = int(match[2])
    return tuple(pairs.items())


def parse_segments(items: Iterable[str] | None) -> tuple[tuple[str, int], ...]:
    """The `--segment NAME=ID` items as (name or number, label) pairs. Errors: UsageError."""
    pairs: dict[str, int] = {}
    for item in items or ():
        name, equals, label = item.rpartition("=")
        if not equals or not name.strip() or not re.fullmatch(r"\s*\d+\s*", label):
            raise UsageError(f"{item!r} is not NAME=ID.", where="--segment", fix="write --segment liver=1.")
        pairs[name.strip()] = int(label)
    return tuple(pairs.items())


def read_options(
    *,
    label_map: Iterable[str] | None = None,
    lossy_labels: int | None = None,
    nan_policy: NanPolicy = NanPolicy.refuse,
    geometry_tol: float | None = None,
    trust_array_order: bool = False,
    allow_external: bool = False,
    series: str | None = None,
    segments: Iterable[str] | None = None,
) -> ReadOptions:
    """What the user allowed for odd files, as the value that is stored in plan.json."""
    from voxdino.core.io.options import ReadOptions

    return ReadOptions(
        label_map=parse_label_map(label_map),
        lossy_threshold=lossy_labels,
        nan_policy="fill" if nan_policy is NanPolicy.fill else "refuse",
        geometry_tolerance=geometry_tol,
        trust_array_order=trust_array_order,
        allow_external=allow_external,
        series=series,
        segments=parse_segments(segments),
    )
