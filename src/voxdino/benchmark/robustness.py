"""The part of a report that tells how scores fall when test images are corrupted."""

from collections.abc import Iterator

from voxdino.benchmark.grid import TaskEntry
from voxdino.benchmark.measures import MEASURES
from voxdino.benchmark.standing import Robustness, Standing
from voxdino.report.page import Cell, Column, CurveSection, Point, Section, Series, TableSection


def robustness_sections(standing: Standing) -> Iterator[Section]:
    """A table of all, and for each task and fault the score against the strength."""
    known = {
        entry.name: (task.metric, found) for entry, task in standing.tasks if (found := _by_encoder(standing, entry))
    }
    if known:
        yield _table(known)
    for task, (metric, found) in known.items():
        for fault in dict.fromkeys(name for one in found.values() for name in one.scores):
            series = tuple(_series(name, one, fault) for name, one in found.items() if fault in one.scores)
            words = fault.replace("_", " ")
            yield CurveSection(
                title=f"{task}: {words}", x_label=f"strength of {words}", y_label=MEASURES[metric].name, series=series
            )


def _by_encoder(standing: Standing, entry: TaskEntry) -> dict[str, Robustness]:
    return {name: one for name in standing.outcome.encoders if (one := standing.robustness(entry, name)) is not None}


def _table(known: dict[str, tuple[str, dict[str, Robustness]]]) -> TableSection:
    faults = dict.fromkeys(name for _, found in known.values() for one in found.values() for name in one.scores)
    rows: list[tuple[Cell, ...]] = []
    for task, (_, found) in known.items():
        for name, one in found.items():
            of_faults = (one.means.get(fault) for fault in faults)
            rows.append((task, name, one.result.cell.resolution, one.clean, one.clean - one.drop, one.drop, *of_faults))
    columns = [Column(title=title) for title in ("Task", "Encoder", "Resolution")]
    columns += [Column(title=title, digits=3) for title in ("Clean", "Corrupted", "Drop")]
    columns += [Column(title=fault.replace("_", " "), digits=3) for fault in faults]
    note = (
        "Test images with faults of scanners and archives, the probe fitted to images as they are. Corrupted: the mean "
    )
    note += "over faults and strengths; of each fault the mean over its strengths."
    return TableSection(title="Corruptions", columns=tuple(columns), rows=tuple(rows), note=note)


def _series(name: str, one: Robustness, fault: str) -> Series:
    """From the clean score, strength 0, on."""
    scores = {0: one.clean, **dict(sorted(one.scores[fault].items()))}
    return Series(name=name, points=tuple(Point(x=float(strength), y=score) for strength, score in scores.items()))
