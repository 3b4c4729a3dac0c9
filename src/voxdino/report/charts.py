"""The charts of a page as SVG without colours of their own: the style sheet gives them, in light and dark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10, sqrt

import numpy as np

from voxdino.report.axes import (
    NUM_COLOURS,
    Axis,
    axis_of,
    dot,
    drawing,
    element,
    line,
    path,
    shorten,
    text,
)
from voxdino.report.page import (
    AgreementSection,
    CurveSection,
    ForestRow,
    ForestSection,
    Point,
    RankSection,
    ReliabilitySection,
    Series,
)
from voxdino.report.texts import interval_text, markup, number

FEW_POINTS = 25  # up to here points are dots with whiskers, beyond it lines with bands
MOST_PLACES = 6  # up to here every x of a logarithmic axis is labelled
NARROW = 480  # pixels: a phone


@dataclass(frozen=True)
class Plot:
    """An area with an axis below and one at its left."""

    x: Axis
    y: Axis

    def frame(self, x_label: str, y_label: str, x_values: Sequence[float] = ()) -> list[str]:
        """Grid, tick labels and names of the axes; `x_values` are labelled instead of round ones."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = []
        for value, label in self.y.ticks(44):
            at = self.y.place(value)
            parts += [line(left, at, right, at, "grid"), text(left - 8, at + 4, label, "tick", "end")]
        for value, label in [(value, number(value)) for value in x_values] or self.x.ticks(64):
            at = self.x.place(value)
            parts += [line(at, bottom, at, bottom + 4, "axis"), text(at, bottom + 18, label, "tick", "middle")]
        parts.append(line(left, bottom, right, bottom, "axis"))
        parts.append(text(right, bottom + 37, x_label, "label", "end"))
        parts.append(text(left - 44, top - 12, y_label, "label"))
        return parts


def draw_curves(section: CurveSection, width: float) -> str:
    """Every series in its colour: lines with bands, or few points with whiskers."""
    points = [point for series in section.series for point in series.points]
    if not points:
        return drawing(width, 60, f"{section.title}: no points", text(0, 30, "no points yet", "tick"))
    height = 300 if width < NARROW else 340
    heights = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    room = 0.03 if section.x_is_log or len(points) > FEW_POINTS else 0.06
    plot = Plot(
        axis_of([p.x for p in points], 52, width - 10, is_log=section.x_is_log, room=room),
        axis_of(heights, height - 48, 30),
    )
    places = sorted({p.x for p in points})
    measured = places if section.x_is_log and len(places) <= MOST_PLACES else []
    parts = plot.frame(section.x_label, section.y_label, measured)
    for place, series in enumerate(section.series):
        parts += _draw_series(plot, series, place)
    told = "; ".join(f"{one.name} {_told_range(one.points)}" for one in section.series)
    return drawing(width, height, f"{section.y_label} over {section.x_label}. {told}", *parts)


def series_class(place: int) -> str:
    """The classes of the series at `place`: a colour, and dashes from the second round of colours on."""
    return f"c{place % NUM_COLOURS}" + (" dashed" if place >= NUM_COLOURS else "")


def _told_range(points: Sequence[Point]) -> str:
    if not points:
        return "has no points"
    return f"from {number(points[0].y)} to {number(points[-1].y)}"


def _draw_series(plot: Plot, series: Series, place: int) -> list[str]:
    colour = series_class(place)
    at = [(plot.x.place(p.x), plot.y.place(p.y)) for p in series.points]
    whole = [p for p in series.points if p.low is not None and p.high is not None]
    parts = []
    if len(whole) > FEW_POINTS:
        lower = [(plot.x.place(p.x), plot.y.place(p.low)) for p in whole if p.low is not None]
        upper = [(plot.x.place(p.x), plot.y.place(p.high)) for p in whole if p.high is not None]
        parts.append(path(lower + upper[::-1], f"band {colour}", closed=True))
    if len(at) > 1:
        parts.append(path(at, f"curve {colour}"))
    if len(at) <= FEW_POINTS:
        for p in whole:
            here = plot.x.place(p.x)
            parts.append(line(here, plot.y.place(p.low or 0.0), here, plot.y.place(p.high or 0.0), f"whisker {colour}"))
        for (x, y), p in zip(at, series.points, strict=True):
            interval = "" if p.low is None or p.high is None else f" [{number(p.low)}, {number(p.high)}]"
            parts.append(dot(x, y, 4, f"dot {colour}", f"{series.name}: {number(p.y)}{interval} at {number(p.x)}"))
    return parts


def draw_forest(section: ForestSection, width: float) -> str:
    """A line per row: name, interval around its mean, and the numbers; on a phone they stand above the interval."""
    known = [row for row in section.rows if row.interval.mean is not None]
    if not known:
        return drawing(width, 60, f"{section.title}: nothing is defined", text(0, 30, "nothing is defined", "tick"))
    has_intervals = any(row.interval.low is not None for row in known)
    is_stacked = width < NARROW and has_intervals
    step = 40 if is_stacked else 28 if len(section.rows) <= 15 else 20
    widest = 0.4 * width if width < NARROW else 260
    names = 0 if is_stacked else min(widest, 7.2 * max(len(row.name) for row in section.rows) + 16)
    numbers = 0 if is_stacked else 158 if has_intervals else 52
    ends = [v for row in known for v in (row.interval.mean, row.interval.low, row.interval.high) if v is not None]
    axis = axis_of(ends, names + 4, width - numbers - 8)
    height = 14 + step * len(section.rows) + 44
    bottom = height - 44
    parts = []
    for value, label in axis.ticks(64):
        at = axis.place(value)
        parts += [line(at, 8, at, bottom, "grid"), text(at, bottom + 18, label, "tick", "middle")]
    for place, row in enumerate(section.rows):
        middle = 14 + step * (place + 0.5)
        parts += _draw_forest_row(axis, row, middle, width, is_stacked)
    parts += [line(axis.start, bottom, axis.end, bottom, "axis")]
    parts += [text(axis.end, bottom + 37, section.axis_label, "label", "end")]
    told = "; ".join(f"{row.name} {interval_text(row.interval)}" for row in section.rows[:20])
    return drawing(width, height, f"{section.axis_label}. {told}", *parts)


def _draw_forest_row(axis: Axis, row: ForestRow, middle: float, width: float, is_stacked: bool) -> list[str]:
    words = middle - 8 if is_stacked else middle + 4
    middle = middle + 6 if is_stacked else middle
    room = width - 150 if is_stacked else axis.start - 16
    name = element("title", markup(row.name)) + text(0, words, shorten(row.name, room, 6.8), "name")
    parts = [element("g", name), text(width, words, interval_text(row.interval), "value", "end")]
    low, mean, high = row.interval.low, row.interval.mean, row.interval.high
    if low is not None and high is not None:
        parts.append(line(axis.place(low), middle, axis.place(high), middle, "interval"))
    if mean is not None:
        parts.append(dot(axis.place(mean), middle, 4.5, "mean", f"{row.name}: {interval_text(row.interval)}"))
    return parts


def draw_ranks(section: RankSection, width: float) -> str:
    """Critical-difference diagram (Demšar, JMLR 2006): bars join methods that cannot be told apart."""
    order = sorted(range(len(section.names)), key=lambda i: section.mean_ranks[i])
    ranks = [section.mean_ranks[i] for i in order]
    num, is_narrow = len(order), width < NARROW
    side = 10.0 if is_narrow else 250.0
    axis = Axis(1.0, float(max(2, num)), side, width - side)
    groups = _groups(ranks, section.critical_difference)
    top = 56.0
    first = top + 26 + 9 * len(groups)
    num_left = 0 if is_narrow else (num + 1) // 2
    parts = [line(axis.start, top, axis.end, top, "axis")]
    for whole in range(1, max(2, num) + 1):
        at = axis.place(whole)
        parts += [line(at, top - 5, at, top, "axis"), text(at, top - 10, str(whole), "tick", "middle")]
    shown = min(axis.place(1 + section.critical_difference), width)
    parts.append(line(axis.start, 16, shown, 16, "interval"))
    parts.append(text(axis.start, 9, f"critical difference {number(section.critical_difference)}", "label"))
    for level, (low, high) in enumerate(groups):
        y = top + 14 + 9 * level
        parts.append(line(axis.place(ranks[low]) - 3, y, axis.place(ranks[high]) + 3, y, "joined"))
    names = []
    for place, (i, rank) in enumerate(zip(order, ranks, strict=True)):
        x, y = axis.place(rank), first + 24 * (place if place < num_left else num - 1 - place)
        is_left = x > width / 2 if is_narrow else place < num_left  # its name stands at the left of its line
        edge = x if is_narrow else side - 10 if is_left else width - side + 10
        room = (edge if is_left else width - edge) - 48
        parts.append(path([(x, top), (x, y), (edge, y)], "leader"))
        hint = element("title", markup(f"{section.names[i]}: mean rank {rank:.2f}"))
        words = f"{shorten(section.names[i], room, 6.8)} {rank:.2f}"
        end, anchor = (edge - 5, "end") if is_left else (edge + 5, "start")
        names.append(element("g", hint, text(end, y + 4, words, "name halo", anchor)))
    told = ", ".join(f"{section.names[i]} {section.mean_ranks[i]:.2f}" for i in order)
    height = first + 24 * (num - num_left if is_narrow else num_left) + 6
    return drawing(width, height, f"Mean ranks: {told}", *parts, *names)


def _groups(ranks: Sequence[float], critical_difference: float) -> list[tuple[int, int]]:
    """First and last place of each longest run of ascending ranks that spans no more than the critical difference."""
    groups: list[tuple[int, int]] = []
    for low in range(len(ranks)):
        high = max(i for i in range(low, len(ranks)) if ranks[i] - ranks[low] <= critical_difference)
        if high > low and (not groups or high > groups[-1][1]):
            groups.append((low, high))
    return groups


def draw_reliability(section: ReliabilitySection, width: float) -> str:
    """Accuracy over confidence, dots as large as their share of the predictions, with the diagonal."""
    size = min(width, 420.0)
    plot = Plot(Axis(0, 1, 52, size - 10), Axis(0, 1, size - 48, 30))
    parts = plot.frame("stated confidence", "observed accuracy")
    parts.append(line(plot.x.place(0), plot.y.place(0), plot.x.place(1), plot.y.place(1), "reference"))
    bins = sorted(one for one in section.bins if one.num)
    total = sum(one.num for one in bins)
    at = [(plot.x.place(one.confidence), plot.y.place(one.accuracy)) for one in bins]
    if len(at) > 1:
        parts.append(path(at, "curve c0"))
    for (x, y), one in zip(at, bins, strict=True):
        hint = f"{one.num} predictions: confidence {one.confidence:.2f}, accuracy {one.accuracy:.2f}"
        parts.append(dot(x, y, 3 + 9 * sqrt(one.num / total), "dot c0", hint))
    told = "; ".join(f"{one.confidence:.2f} stated, {one.accuracy:.2f} observed" for one in bins)
    return drawing(size, size, f"Observed accuracy over stated confidence. {told}", *parts)


def draw_agreement(section: AgreementSection, width: float) -> str:
    """Bland and Altman: difference over mean of each case, the mean difference and 1.96 deviations around it."""
    if not section.points:
        return drawing(width, 60, f"{section.title}: no cases", text(0, 30, "no cases", "tick"))
    height = 300 if width < NARROW else 340
    differences = np.array([point.predicted - point.reference for point in section.points])
    means = [(point.predicted + point.reference) / 2 for point in section.points]
    middle = float(differences.mean())
    spread = 1.96 * float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    levels = {"mean": middle, "+1.96 SD": middle + spread, "−1.96 SD": middle - spread}
    plot = Plot(
        axis_of(means, 52, width - 86), axis_of([*differences.tolist(), *levels.values(), 0.0], height - 48, 30)
    )
    unit = f" ({section.unit})" if section.unit else ""
    parts = plot.frame(f"mean of reference and prediction{unit}", f"prediction − reference{unit}")
    parts.append(line(plot.x.start, plot.y.place(0), plot.x.end, plot.y.place(0), "axis"))
    digits = max(0, 2 - floor(log10(spread))) if spread else None
    for name, level in levels.items():
        at = plot.y.place(level)
        parts.append(line(plot.x.start, at, plot.x.end, at, "reference" if name == "mean" else "limit"))
        if spread or name == "mean":
            parts.append(text(plot.x.end + 6, at - 2, name, "label"))
            parts.append(text(plot.x.end + 6, at + 12, number(level, digits), "value"))
    for mean, difference, point in zip(means, differences.tolist(), section.points, strict=True):
        hint = f"{point.case}: reference {number(point.reference)}, predicted {number(point.predicted)}{unit}"
        parts.append(dot(plot.x.place(mean), plot.y.place(difference), 4, "dot faint c0", hint))
    told = ", ".join(f"{name} {number(level, digits)}{unit}" for name, level in levels.items())
    return drawing(width, height, f"Agreement over {len(means)} cases: {told}", *parts)


CHARTS: dict[str, Callable[..., str]] = {
    "curve": draw_curves,
    "forest": draw_forest,
    "rank": draw_ranks,
    "reliability": draw_reliability,
    "agreement": draw_agreement,
}
