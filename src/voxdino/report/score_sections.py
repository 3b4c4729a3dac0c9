"""The sections of a page about scores: per structure, per case, volumes, lesions, failures and definitions."""

from collections.abc import Mapping, Sequence

from voxdino.evaluation.report import lesion_rows
from voxdino.evaluation.scores import Scores, StructureScores, Summary
from voxdino.report.page import (
    AgreementPoint,
    AgreementSection,
    Cell,
    Column,
    FailedFile,
    FailureSection,
    ForestRow,
    ForestSection,
    Interval,
    Section,
    TableSection,
)

HEADINGS = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "assd": "ASSD", "nsd": "NSD"}
MAIN_METRICS = ("dice", "nsd", "iou", "lesion_f1")  # the first that was measured stands for the whole
FACTS = frozenset({"volume", "volume_error"})  # neither more nor less of them is better
FORMATTED = {"": 3}  # digits by unit
MOST_STRUCTURES = 8  # with an agreement plot of their own
MOST_FOREST_ROWS = 120
MOST_TABLE_ROWS = 2000


def main_metric(scores: Scores) -> str | None:
    """The metric that stands for the whole in plots of cases and comparisons."""
    return next((name for name in MAIN_METRICS if name in scores.definitions), None)


def metric_heading(metric: str) -> str:
    """ "HD95", "volume error"."""
    return HEADINGS.get(metric, metric.replace("_", " "))


def metric_column(metric: str, unit: str) -> Column:
    """Its heading, unit and digits."""
    return Column(title=metric_heading(metric), unit=unit, digits=FORMATTED.get(unit, 2))


def interval_of(row: Summary) -> Interval:
    """The mean of a summary with its interval."""
    return Interval(mean=row.mean, low=row.low, high=row.high, num_undefined=row.num_undefined)


def score_facts(scores: Scores) -> tuple[tuple[str, str], ...]:
    """What stands at the top of the page."""
    facts = [("cases", str(scores.num_cases)), ("structures", str(len(scores.counts)))]
    metric = main_metric(scores)
    if metric is not None and (mean := scores.mean(metric)) is not None:
        facts.insert(0, (f"mean {metric_heading(metric)}", f"{mean:.3f}"))
    if scores.num_patients is not None:
        facts.append(("patients", str(scores.num_patients)))
    if "nsd" in scores.definitions:
        facts.append(("tolerance of NSD", f"{scores.tolerance:g} {scores.length_unit}"))
    if scores.failed:
        facts.append(("not scored", str(len(scores.failed))))
    return tuple(facts)


def score_sections(scores: Scores) -> tuple[Section, ...]:
    """Everything scores.json says, most important first; failures are the caller's to place (`failure_section`)."""
    metric = main_metric(scores)
    sections: list[Section] = [_structure_table(scores)]
    if metric is not None:
        sections += _forests(scores, metric)
    sections += _agreements(scores)
    if scores.lesions:
        header, rows = lesion_rows(scores)
        columns = tuple(Column(title=name) for name in header)
        sections.append(TableSection(title="Lesions", columns=columns, rows=tuple(tuple(row) for row in rows)))
    sections += [_case_table(scores), _definitions(scores)]
    return tuple(sections)


def failure_section(scores: Scores) -> FailureSection:
    """The cases that could not be scored, each with its message."""
    items = tuple(FailedFile(failed.case, failed.message) for failed in scores.failed)
    return FailureSection(title="What failed", items=items)


def values_by_case(scores: Scores, metric: str) -> dict[str, float]:
    """Mean over the structures of each case in which the metric is defined."""
    found: dict[str, list[float]] = {}
    for row in scores.cases:
        if (value := row.values.get(metric)) is not None:
            found.setdefault(row.case, []).append(value)
    return {case: sum(values) / len(values) for case, values in found.items()}


def summary_cells(scores: Scores) -> Mapping[tuple[str, str], Summary]:
    """Summaries by structure and metric."""
    return {(row.structure, row.metric): row for row in scores.summary}


def _structure_table(scores: Scores) -> TableSection:
    cells, units = summary_cells(scores), {row.metric: row.unit for row in scores.summary}
    counts = {count.structure: count for count in scores.counts}
    qualities = [metric for metric in scores.definitions if metric not in FACTS]
    facts = [metric for metric in scores.definitions if metric in FACTS]
    rows = []
    for name in dict.fromkeys(row.structure for row in scores.summary):
        found = {m: interval_of(cells[name, m]) if (name, m) in cells else None for m in scores.definitions}
        count = counts.get(name)
        missed = f"{count.missed}\u00a0of\u00a0{count.both + count.missed}" if count else None
        false_alarms = count.false_alarm if count else None
        rows.append((name, *(found[m] for m in qualities), missed, false_alarms, *(found[m] for m in facts)))
    over = "cases" if scores.num_patients is None else "patients"
    return TableSection(
        title="Scores by structure",
        columns=(
            Column(title="structure"),
            *(metric_column(metric, units.get(metric, "")) for metric in qualities),
            Column(title="missed"),
            Column(title="false alarms"),
            *(metric_column(metric, units.get(metric, "")) for metric in facts),
        ),
        rows=tuple(rows),
        note=f"Mean over cases with its 95 % bootstrap interval over {over} (BCa, widened for their number). “mean” "
        "averages the structures of each case first. Missed: only the reference holds the structure; false alarm: only "
        "the prediction does.",
    )


def _forests(scores: Scores, metric: str) -> list[Section]:
    cells, name = summary_cells(scores), metric_heading(metric)
    sections: list[Section] = []
    structures = [count.structure for count in scores.counts if (count.structure, metric) in cells]
    if len(structures) > 1:
        rows = tuple(ForestRow(one, interval_of(cells[one, metric])) for one in structures)
        sections.append(ForestSection(title=f"{name} by structure", axis_label=f"mean {name}", rows=rows))
    by_case = sorted(values_by_case(scores, metric).items(), key=lambda item: item[1])
    rows = tuple(ForestRow(case, Interval(mean=value, low=None, high=None)) for case, value in by_case)
    left_out = len(rows) - MOST_FOREST_ROWS
    note = f"The {MOST_FOREST_ROWS} lowest; {left_out} more cases score higher." if left_out > 0 else ""
    label = f"{name}, mean over the structures of a case"
    shown = rows[:MOST_FOREST_ROWS]
    return [*sections, ForestSection(title=f"{name} by case, lowest first", axis_label=label, rows=shown, note=note)]


def _agreements(scores: Scores) -> list[Section]:
    """A plot per structure, of those that differ most for their size."""
    found: dict[str, list[AgreementPoint]] = {}
    for row in scores.cases:
        volume, error = row.values.get("volume"), row.values.get("volume_error")
        if volume is not None and error is not None and row.outcome != "absent":
            point = AgreementPoint(case=row.case, reference=max(0.0, volume - error), predicted=volume)
            found.setdefault(row.structure, []).append(point)
    order = sorted(found, key=lambda name: -_relative_error(found[name]))
    note = "Each dot is a case. Dotted: the mean difference; dashed: 95 % of the differences, if they are normal."
    if len(found) > MOST_STRUCTURES:
        note += f" The {MOST_STRUCTURES} of {len(found)} structures that differ most for their size are shown."
    return [
        AgreementSection(
            title=f"Agreement of volumes: {name}", unit=scores.volume_unit, points=tuple(found[name]), note=note
        )
        for name in order[:MOST_STRUCTURES]
    ]


def _relative_error(points: Sequence[AgreementPoint]) -> float:
    total = sum(point.reference for point in points)
    return sum(abs(point.predicted - point.reference) for point in points) / total if total else float("inf")


def _case_table(scores: Scores) -> TableSection:
    units = {row.metric: row.unit for row in scores.summary}
    metrics = tuple(scores.definitions)
    rows: list[StructureScores] = list(scores.cases)
    note = ""
    if len(rows) > MOST_TABLE_ROWS:
        note = f"The first {MOST_TABLE_ROWS} of {len(rows)} rows; scores.json has all."
    cells: list[tuple[Cell, ...]] = [
        (row.case, row.structure, row.outcome, *(row.values.get(metric) for metric in metrics))
        for row in rows[:MOST_TABLE_ROWS]
    ]
    columns = (Column(title="case"), Column(title="structure"), Column(title="in"))
    numbers = tuple(metric_column(metric, units.get(metric, "")) for metric in metrics)
    return TableSection(title="Every case", columns=(*columns, *numbers), rows=tuple(cells), note=note)


def _definitions(scores: Scores) -> TableSection:
    columns = (Column(title="metric"), Column(title="definition"), Column(title="what it does with empty masks"))
    rows = tuple((metric_heading(m), scores.definitions[m], scores.rules.get(m, "")) for m in scores.definitions)
    return TableSection(title="Definitions", columns=columns, rows=rows)
