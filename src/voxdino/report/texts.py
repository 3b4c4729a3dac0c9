"""Numbers and strangers' texts as words: what every form of a report (HTML, Markdown, LaTeX, CSV) agrees on."""

import re
from html import escape
from math import floor, log10

from voxdino.report.page import Cell, Column, Interval

# Controls, line breaks and the characters that turn the direction of writing: they could hide what a name says.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")


def plain(words: str) -> str:
    """The words on one line, without characters that are not seen."""
    return _UNSEEN.sub(" ", words).strip()


def markup(words: str) -> str:
    """The words as HTML or SVG text or attribute: whatever they hold is shown, never obeyed."""
    return escape(plain(words))


def name_markup(words: str) -> str:
    """As `markup`, and a long name may be broken behind its separators."""
    return re.sub(r"([_/.-]+)", r"\1<wbr>", markup(words))


def number(value: float, digits: int | None = None) -> str:
    """ "0.912" with `digits` after the point; else three significant ones, large numbers whole; a true minus."""
    if digits is None and value != 0:
        size = floor(log10(abs(value)))
        if size < -4 or size > 9:
            return f"{value:.2e}".replace("-", "−")
        digits = max(0, 2 - size)
    return f"{value:.{digits or 0}f}".replace("-", "−")


def p_value(p: float) -> str:
    """ "p = 0.012", "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def cell_text(cell: Cell, column: Column) -> str:
    """A cell on one line: "0.912 [0.899, 0.923]", "–" for what is undefined."""
    if isinstance(cell, Interval):
        return interval_text(cell, column.digits)
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return plain(cell)
    if isinstance(cell, int):
        return f"{cell:,}".replace(",", "\u202f").replace("-", "−")
    return number(cell, column.digits)


def interval_text(interval: Interval, digits: int | None = None) -> str:
    """ "0.912 [0.899, 0.923] (2 undefined)"; "undefined" without a mean."""
    if interval.mean is None:
        return "undefined"
    missing = f" ({interval.num_undefined} undefined)" if interval.num_undefined else ""
    return f"{number(interval.mean, digits)}{range_text(interval, digits)}{missing}"


def range_text(interval: Interval, digits: int | None = None) -> str:
    """ " [0.899, 0.923]"; "" without an interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f" [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def heading(column: Column) -> str:
    """ "HD95 (mm)"."""
    return plain(f"{column.title} ({column.unit})" if column.unit else column.title)


def best_rows(column: Column, cells: list[Cell]) -> set[int]:
    """Rows with the best number of a column, as shown; none where one direction is not better, or all are equal."""
    numbers = {row: value for row, cell in enumerate(cells) if (value := numeric(cell)) is not None}
    shown = {row: number(value, column.digits) for row, value in numbers.items()}
    if column.better is None or len(set(shown.values())) < 2:
        return set()
    pick = max if column.better == "higher" else min
    best = shown[pick(numbers, key=lambda row: numbers[row])]
    return {row for row, words in shown.items() if words == best}


def numeric(cell: Cell) -> float | None:
    """The number of a cell that has one: of an interval its mean."""
    if isinstance(cell, Interval):
        return cell.mean
    return None if cell is None or isinstance(cell, str) else float(cell)
