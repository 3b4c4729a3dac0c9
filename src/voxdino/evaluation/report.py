"""The table of a Scores record: rows for any output, and the same as a rich table for a terminal."""

from typing import TYPE_CHECKING

from voxdino.evaluation.metrics import METRICS
from voxdino.evaluation.scores import LesionBin, Scores, Share, Summary

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = {"dice": "Dice", "hd95": "HD95", "nsd": "NSD", "volume_error": "volume error"} | {
    name: name for name, metric in METRICS.items() if metric.paper
}  # the others: scores.json


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
    over = "cases" if scores.num_patients is None else f"{scores.num_patients} patients"
    notes = [f"{scores.num_cases} cases, mean [95 % bootstrap interval over {over}]"]
    shown = [metric for metric in HEADINGS if metric in scores.definitions]
    notes.append("definitions: " + ", ".join(f"{name} = {scores.definitions[name]}" for name in shown))
    notes += [f"{count.structure}: in neither mask in {count.absent} cases" for count in scores.counts if count.absent]
    notes += scores.warnings
    notes += [f"not scored: {failed.case}: {failed.message}" for failed in scores.failed]
    table = Table(title="Scores", caption="\n".join(notes), caption_justify="left", title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row, end_section=row is rows[-2] if len(rows) > 1 else False)
    return table


def lesion_rows(scores: Scores) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) of texts: per structure all lesions, by thirds of the reference's sizes, and by fixed sizes."""
    header = ("structure", "size", "lesions", "found", "recall", "precision", "F1", "false alarms")
    rows = []
    for one in scores.lesions:
        false_alarms = f"{one.num_predicted - one.num_true} of {one.num_predicted}"
        shares = (format_share(share) for share in (one.recall, one.precision, one.f1))
        rows.append((one.structure, "all", str(one.num_reference), str(one.num_found), *shares, false_alarms))
        bins = [(of, "third: ") for of in one.by_tercile] + [(of, "") for of in one.by_volume]
        for of, kind in bins:
            cells = (f"{kind}{_format_range(of)} {one.unit}", str(of.num), str(of.num_found), format_share(of.recall))
            rows.append(("", *cells, "", "", ""))
    return header, rows


def lesion_table(scores: Scores) -> "Table":
    """The lesion-wise scores as a rich table, with what counts as found below it."""
    from rich.table import Table

    header, rows = lesion_rows(scores)
    needed = max((one.min_overlap for one in scores.lesions), default=0.0)
    rule = f"{needed:.0%} of its voxels are" if needed else "one of its voxels is"
    note = f"all cases together [95 % bootstrap interval over cases]; a lesion is found when {rule} marked"
    table = Table(title="Lesions", caption=note, caption_justify="left", title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position < 2 else "right")
    for place, row in enumerate(rows):
        table.add_row(*row, end_section=place + 1 < len(rows) and bool(rows[place + 1][0]))
    return table


def format_share(share: Share) -> str:
    """ "0.714 [0.62, 0.80]" with three digits each; "undefined" where there is nothing to count."""
    if share.value is None:
        return "undefined"
    return f"{share.value:.3f}" + ("" if share.low is None else f" [{share.low:.3f}, {share.high:.3f}]")


def _format_range(of: LesionBin) -> str:
    if of.low is None:
        return "all" if of.high is None else f"up to {of.high:.4g}"
    return f"above {of.low:.4g}" if of.high is None else f"{of.low:.4g} to {of.high:.4g}"


def format_mean(row: Summary) -> str:
    """ "0.912 [0.899, 0.923]"; "undefined" where no case defines it."""
    if row.mean is None:
        return "undefined"
    digits = 3 if row.unit == "" else 2
    interval = "" if row.low is None else f" [{row.low:.{digits}f}, {row.high:.{digits}f}]"
    undefined = f" ({row.num_undefined} undefined)" if row.num_undefined else ""
    return f"{row.mean:.{digits}f}{interval}{undefined}"


def _heading(metric: str, scores: Scores) -> str:
    of = METRICS[metric]
    unit = {"length": scores.length_unit, "volume": scores.volume_unit}.get(of.unit, of.unit)
    at = f" at {scores.tolerance:g} {scores.length_unit}" if metric.split(":")[-1] == "nsd" else ""
    return HEADINGS.get(metric, metric) + at + (f" ({unit})" if unit else "")
