"""The sections of a page about a run: its curves, what it cost, with which settings."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from voxdino.report.page import Column, CurveSection, Point, Section, Series, TableSection
from voxdino.report.results import Result, RunFacts

MOST_POINTS = 200  # of a curve; more steps are averaged in blocks
NO_LOSS = frozenset({"step", "stage", "skipped", "grad_norm", "lr_factor", "dice"})
COSTS = {
    "num_steps": "steps",
    "num_skipped": "steps skipped (no finite loss)",
    "elapsed_s": "seconds",
    "ended_by": "ended by",
    "data_wait": "share of time waiting for data",
}

Rows = Sequence[dict[str, Any]]


def run_facts(run: RunFacts) -> tuple[tuple[str, str], ...]:
    """What stands at the top of the page."""
    facts = [("recipe", str(run.config.get("recipe", "–"))), ("backbone", run.backbone.get("name") or "none")]
    if run.fold is not None and run.split is not None:
        num_train, num_val = (len(run.split.get(side, ())) for side in ("train", "val"))
        facts.append(("training", f"{num_train} cases, {num_val} held back (fold {run.fold})"))
    if run.pool is not None:
        facts.append(("pool", f"{run.pool.get('num_slices', '–')} slices"))
    outcome = run.outcome
    if outcome is None:
        return (*facts, ("state", "not ended"))
    if "best_dice" in outcome:
        facts.append(("best validation Dice", f"{outcome['best_dice']:.3f} at step {outcome['best_step']}"))
    return (*facts, ("time", f"{outcome['elapsed_s'] / 60:.1f} min on {run.device}"))


def run_warnings(run: RunFacts) -> tuple[str, ...]:
    """What a reader must know before the numbers."""
    warnings = []
    if run.pretrained_on:
        warnings.append(
            f"{len(run.pretrained_on)} held-back cases (first: {run.pretrained_on[0]}) were in the pool that the "
            "backbone was pretrained on: their scores are not of unseen images."
        )
    if run.outcome is None:
        warnings.append("This run has not ended: its curves go on.")
    return tuple(warnings)


def curve_sections(result: Result) -> tuple[Section, ...]:
    """Loss, validation, and what a pretraining watched, over the steps; of a first stage too."""
    sections: list[Section] = []
    for rows, stage in ((result.first_log, " of the first stage"), (result.log, "")):
        sections += _validation(rows, stage)
        sections += _losses(rows, stage)
        sections += _watched(rows, stage)
    return tuple(sections)


def validation_curve(rows: Rows, name: str) -> Series:
    """The validation Dice of a log, under the name of its run."""
    return Series(name=name, points=tuple(Point(x=row["step"], y=row["dice"]) for row in rows if "dice" in row))


def _validation(rows: Rows, stage: str) -> list[Section]:
    looked = [row for row in rows if "dice" in row]
    if not looked:
        return []
    names = dict.fromkeys(name for row in looked for name in row.get("per_class", {}))
    series = [validation_curve(looked, "mean")] if len(names) != 1 else []
    for name in names:
        points = ((row["step"], row["per_class"].get(name)) for row in looked)
        series.append(Series(name=name, points=tuple(Point(x=x, y=y) for x, y in points if y is not None)))
    note = "Dice of held-back slices at prepared resolution, pooled; evaluate measures whole cases."
    return [_curves(f"Validation Dice{stage}", "Dice", series, note)]


def _losses(rows: Rows, stage: str) -> list[Section]:
    names = dict.fromkeys(
        key for row in rows for key, value in row.items() if key not in NO_LOSS and isinstance(value, float)
    )
    series = [Series(name=name.replace("_", " "), points=_averaged(rows, name)) for name in names]
    if not series:
        return []
    num_steps = max(row["step"] for row in rows)
    size = -(-num_steps // MOST_POINTS)
    note = f"Each point is the mean of {size} steps, the band their middle half." if size > 1 else ""
    return [_curves(f"Training loss{stage}", "loss", series, note)]


def _watched(rows: Rows, stage: str) -> list[Section]:
    looked = [(row["step"], row["watch"]) for row in rows if isinstance(row.get("watch"), dict)]
    names = dict.fromkeys(
        name for _, values in looked for name, value in values.items() if isinstance(value, int | float)
    )
    sections: list[Section] = []
    for name in names:
        points = tuple(Point(x=step, y=values[name]) for step, values in looked if values.get(name) is not None)
        words = name.replace("_", " ")
        sections.append(_curves(f"Watched{stage}: {words}", words, [Series(name=words, points=points)], ""))
    return sections


def _curves(title: str, y_label: str, series: Sequence[Series], note: str) -> CurveSection:
    return CurveSection(title=title, x_label="step", y_label=y_label, series=tuple(series), note=note)


def _averaged(rows: Rows, name: str) -> tuple[Point, ...]:
    """At most MOST_POINTS means of equally many values in turn, with the quartiles of each block."""
    known = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    size = -(-len(known) // MOST_POINTS)
    if size < 2:
        return tuple(Point(x=step, y=value) for step, value in known)
    points = []
    for start in range(0, len(known), size):
        steps, values = zip(*known[start : start + size], strict=True)
        ordered, quarter = sorted(values), len(values) // 4
        points.append(Point(x=fmean(steps), y=fmean(values), low=ordered[quarter], high=ordered[-1 - quarter]))
    return tuple(points)


def cost_section(run: RunFacts) -> TableSection:
    """What the run took and what it ran on."""
    parameters = run.num_parameters if isinstance(run.num_parameters, dict) else {"all": run.num_parameters}
    outcome = run.outcome or {}
    rows = [(f"parameters, {name}", f"{number:,}".replace(",", "\u202f")) for name, number in parameters.items()]
    rows += [(words, str(outcome[key])) for key, words in COSTS.items() if key in outcome]
    rows += [("device", run.device), ("Python", run.python), ("licence of the backbone", str(run.backbone["licence"]))]
    return TableSection(title="Cost", columns=(Column(title="what"), Column(title="value")), rows=tuple(rows))


def settings_section(run: RunFacts) -> TableSection:
    """Every setting of the run, flat, as in run.json."""
    rows = tuple(_flat(run.config, ""))
    return TableSection(title="Settings", columns=(Column(title="setting"), Column(title="value")), rows=rows)


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for key, one in value.items() for row in _flat(one, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return _flat({str(place): one for place, one in enumerate(value)}, name)
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [(name, "none" if value is None else str(value))]
