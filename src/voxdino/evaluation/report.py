"""The table of a Scores record: rows for any output, and the same as a rich table for a terminal."""

from typing import TYPE_CHECKING

from voxdino.evaluation.metrics import METRICS
from voxdino.evaluation.scores import Scores, Summary

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = {"dice": "Dice", "hd95": "HD95", "nsd": "NSD", "volume_error": "volume error"}  # the others: scores.json


def report_rows(scores: Scores) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) of texts: a row per structure, a column per metric, then the cases missed or wrongly claimed."""
    metrics = [metric for metric in HEADINGS if metric in scores.definitions] or list(scores.definitions)
    names = dict.fromkeys(row.structure for row in scores.summary)
    cells = {(row.structure, row.metric): row for row in scores.summary}
    counts = {count.structure: count for count in scores.counts}
    header = ("structure", *(_heading(metric, scores) for metric in metrics), "missed", "false alarms")
    rows = []
    for name in names:
        count = counts.get(name)
        numbers = (f"{count.missed} of {count.both + count.missed}", str(count.false_alarm)) if count else ("", "")
        texts = [format_mean(cells[name, metric]) if (name, metric) in cells else "" for metric in metrics]
        rows.append((name, *texts, *numbers))
    return header, rows


def report_table(scores: Scores) -> "Table":
    """The rows as a rich table, with definitions, warnings and failed cases below it."""
    from rich.table import Table

    header, rows = report_rows(scores)
    notes = [f"{scores.num_cases} cases, mean [95 % bootstrap interval over cases]"]
    notes += scores.warnings
    notes += [f"not scored: {failed.case}: {failed.message}" for failed in scores.failed]
    table = Table(title="Scores", caption="\n".join(notes), caption_justify="left", title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row, end_section=row is rows[-2] if len(rows) > 1 else False)
    return table


def format_mean(row: Summary) -> str:
    """ "0.912 [0.899, 0.923]"; "undefined" where no case defines it."""
    if row.mean is None:
        return "undefined"
    digits = 3 if row.unit == "" else 2
    interval = "" if row.low is None else f" [{row.low:.{digits}f}, {row.high:.{digits}f}]"
    undefined = f" ({row.num_undefined} undefined)" if row.num_undefined else ""
    return f"{row.mean:.{digits}f}{interval}{undefined}"


def _heading(metric: str, scores: Scores) -> str:
    unit = {"": "", "length": scores.length_unit, "volume": scores.volume_unit}[METRICS[metric].unit]
    at = f" at {scores.tolerance:g} {scores.length_unit}" if metric == "nsd" else ""
    return HEADINGS.get(metric, metric) + at + (f" ({unit})" if unit else "")
