"""A page as one HTML file that needs nothing else: style, script, charts and pictures are inside, nothing is fetched.

Every text is escaped, and a content security policy lets only our own style and script run, known by their digest.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from voxdino import __version__
from voxdino.report.axes import Axis, dot, element, line
from voxdino.report.charts import CHARTS, series_class
from voxdino.report.page import (
    Cell,
    Column,
    CurveSection,
    FailureSection,
    GallerySection,
    Interval,
    ReportPage,
    TableSection,
    TextSection,
)
from voxdino.report.texts import best_rows, cell_text, markup, name_markup, number, numeric, range_text

WIDE, NARROW = 880.0, 330.0  # pixels that charts are drawn for: a desktop's column and a phone's
LONG_TABLE = 24  # rows; longer ones scroll in a box of their own


def render(page: ReportPage) -> str:
    """The page as HTML text. The same page gives the same text."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    names = [f"s{place}" for place in range(1, len(page.sections) + 1)]
    links = "".join(
        f'<li><a href="#{name}">{markup(section.title)}</a></li>'
        for name, section in zip(names, page.sections, strict=True)
    )
    sections = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title" data-kind="{section.kind}">'
        f'<h2 id="{name}-title">{markup(section.title)}</h2>\n{_SECTIONS[section.kind](section)}</section>'
        for name, section in zip(names, page.sections, strict=True)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{markup(page.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header>
<p class="brand">voxdino report</p>
<h1>{markup(page.title)}</h1>
<p class="subtitle">{markup(page.subtitle)}</p>
{_facts(page.facts, "tiles")}{_warnings(page.warnings)}</header>
<div class="columns">
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="content">
{sections}
</main>
</div>
<footer><p>Made by voxdino {__version__}. The tables are beside this file as CSV, JSON, Markdown and LaTeX.
For research only: not a medical device.</p></footer>
<script>{script}</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _facts(facts: Sequence[tuple[str, str]], class_: str) -> str:
    if not facts:
        return ""
    told = "".join(f"<div><dt>{markup(name)}</dt><dd>{markup(value)}</dd></div>" for name, value in facts)
    return f'<dl class="{class_}">{told}</dl>\n'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    told = "".join(f"<li>{markup(warning)}</li>" for warning in warnings)
    return f'<aside class="warnings" aria-label="Read this first"><ul>{told}</ul></aside>\n'


def _note(note: str) -> str:
    return f'<p class="note">{markup(note)}</p>\n' if note else ""


def _text(section: TextSection) -> str:
    return "".join(f"<p>{markup(paragraph)}</p>\n" for paragraph in section.paragraphs)


def _chart(section: Any) -> str:
    """The chart twice, for a desktop and for a phone; the style sheet shows the one that fits."""
    draw = CHARTS[section.kind]
    legend = _legend(section) if isinstance(section, CurveSection) else ""
    shown = "".join(
        f'<div class="{name}">{draw(section, width)}</div>\n' for name, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return f"<figure>{legend}{shown}{_note(section.note)}</figure>\n"


def _legend(section: CurveSection) -> str:
    if len(section.series) < 2:
        return ""
    items = "".join(
        f'<li><svg width="22" height="10" aria-hidden="true">{line(0, 5, 22, 5, f"curve {series_class(place)}")}</svg>'
        f"{markup(series.name)}</li>"
        for place, series in enumerate(section.series)
    )
    return f'<ul class="legend">{items}</ul>'


def _table(section: TableSection) -> str:
    cells = [[row[i] for row in section.rows] for i in range(len(section.columns))]
    best = [best_rows(column, own) for column, own in zip(section.columns, cells, strict=True)]
    scales = [_scale(own) for own in cells]
    head = "".join(_head_cell(column, own) for column, own in zip(section.columns, cells, strict=True))
    rows = []
    for place, row in enumerate(section.rows):
        drawn = (
            _cell(cell, column, scales[i], is_name=i == 0, is_best=place in best[i])
            for i, (cell, column) in enumerate(zip(row, section.columns, strict=True))
        )
        rows.append(f"<tr>{''.join(drawn)}</tr>\n")
    box = "scroll long" if len(section.rows) > LONG_TABLE else "scroll"
    return (
        f'<div class="{box}" role="region" tabindex="0" aria-label="{markup(section.title)}, table">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>\n{_note(section.note)}"
    )


def _head_cell(column: Column, cells: Sequence[Cell]) -> str:
    kind = "text" if any(isinstance(cell, str) for cell in cells) else "num"
    unit = f' <span class="unit">{markup(column.unit)}</span>' if column.unit else ""
    direction = {"higher": " ↑", "lower": " ↓", None: ""}[column.better]
    return f'<th scope="col" class="{kind}"><button type="button">{markup(column.title)}{direction}{unit}</button></th>'


def _cell(cell: Cell, column: Column, scale: Axis | None, *, is_name: bool, is_best: bool) -> str:
    """A table cell with its value for sorting; below an interval's mean its ends, to scale with the column."""
    value = numeric(cell)
    sort = "" if value is None else f' data-sort="{value!r}"'
    told = name_markup(cell_text(cell, column)) if isinstance(cell, str) else cell_text(cell, column)
    if isinstance(cell, Interval) and cell.mean is not None:
        told = f'<span class="mean">{number(cell.mean, column.digits)}</span>{_small_interval(cell, column, scale)}'
    elif value is None and not isinstance(cell, str):
        told = f'<span class="none">{told}</span>'
    tag = "th" if is_name else "td"
    scope = ' scope="row"' if is_name else ""
    class_ = ("text" if isinstance(cell, str) else "num") + (" best" if is_best else "")
    return f'<{tag}{scope} class="{class_}"{sort}>{told}</{tag}>'


def _small_interval(cell: Interval, column: Column, scale: Axis | None) -> str:
    missing = f'<span class="missing">{cell.num_undefined} undefined</span>' if cell.num_undefined else ""
    if cell.low is None or cell.high is None or cell.mean is None or scale is None:
        return missing
    low, high, mean = (scale.place(value) for value in (cell.low, cell.high, cell.mean))
    shown = element(
        "svg",
        line(low, 4, high, 4, "interval"),
        dot(mean, 4, 2.5, "mean"),
        viewBox="0 0 88 8",
        width=88,
        height=8,
        aria_hidden="true",
    )
    return f'<span class="range">{range_text(cell, column.digits).strip()}</span>{shown}{missing}'


def _scale(cells: Sequence[Cell]) -> Axis | None:
    """The common scale of a column's intervals; None where there is none, or no width."""
    ends = [end for cell in cells if isinstance(cell, Interval) for end in (cell.low, cell.high) if end is not None]
    return Axis(min(ends), max(ends), 3, 85) if ends and max(ends) > min(ends) else None


def _gallery(section: GallerySection) -> str:
    items = "".join(
        f'<figure><img alt="{markup(item.caption)}" loading="lazy" '
        f'src="data:image/png;base64,{base64.b64encode(item.png).decode()}">'
        f"<figcaption><strong>{markup(item.caption)}</strong>{_facts(item.facts, 'inline')}</figcaption></figure>\n"
        for item in section.items
    )
    return f'<div class="pictures">{items}</div>\n{_note(section.note)}'


def _failures(section: FailureSection) -> str:
    if not section.items:
        return '<p class="fine">Nothing failed.</p>\n'
    items = "".join(
        f"<li><code>{markup(item.file)}</code><span>{markup(item.message)}</span></li>\n" for item in section.items
    )
    return f"<ul>{items}</ul>\n"


_SECTIONS: dict[str, Callable[[Any], str]] = {
    "text": _text,
    "table": _table,
    "gallery": _gallery,
    "failure": _failures,
    **dict.fromkeys(CHARTS, _chart),
}
