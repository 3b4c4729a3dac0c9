"""The tables of a page for other programs: CSV, JSON, Markdown and LaTeX. Names of strangers stay names."""

import csv
import io
import json
import re
from collections.abc import Callable

from voxdino.report.page import Cell, Interval, TableSection
from voxdino.report.texts import best_rows, cell_text, heading, plain

_FORMULA = ("=", "+", "-", "@")  # a spreadsheet runs what begins so
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "–": "--",
    "²": r"\textsuperscript{2}",
    "³": r"\textsuperscript{3}",
    "\u202f": r"\,",
    "\u00a0": "~",
}


def to_csv(table: TableSection) -> str:
    """Numbers in full; a column of intervals becomes four: mean, low, high and the number of undefined cases.

    A text that a spreadsheet would take for a formula gets an apostrophe in front (OWASP, "CSV injection").
    """
    spread = [any(isinstance(row[i], Interval) for row in table.rows) for i in range(len(table.columns))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header: list[str] = []
    for column, is_spread in zip(table.columns, spread, strict=True):
        name = _harmless(heading(column))
        header += [name, f"{name} low", f"{name} high", f"{name} undefined"] if is_spread else [name]
    writer.writerow(header)
    for row in table.rows:
        writer.writerow([value for cell, wide in zip(row, spread, strict=True) for value in _values(cell, wide)])
    return file.getvalue()


def _values(cell: Cell, is_spread: bool) -> list[str | int | float | None]:
    if isinstance(cell, Interval):
        return [cell.mean, cell.low, cell.high, cell.num_undefined]
    value = _harmless(cell) if isinstance(cell, str) else cell
    return [value, None, None, None] if is_spread else [value]


def _harmless(words: str) -> str:
    shown = plain(words)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def to_json(table: TableSection) -> str:
    """The table as the page has it: columns with units, rows of values, intervals as objects."""
    return json.dumps(table.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(table: TableSection) -> str:
    """A pipe table, the best number of a column in bold."""
    names = [_markdown(heading(column)) for column in table.columns]
    rows = [" | ".join(row) for row in _texts(table, _markdown, "**{}**")]
    parts = [f"### {_markdown(plain(table.title))}", "", *_pipes(names), *(f"| {row} |" for row in rows)]
    return "\n".join([*parts, *(["", _markdown(plain(table.note))] if table.note else [])]) + "\n"


def _pipes(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]


def _markdown(words: str) -> str:
    return re.sub(r"([\\`*_\[\]{}()#+!|~$-])", r"\\\1", words.replace("&", "&amp;")).replace("<", "&lt;")


def to_latex(table: TableSection) -> str:
    """A booktabs table, the best number of a column in bold."""
    names = " & ".join(_latex(heading(column)) for column in table.columns)
    rows = [" & ".join(row) + r" \\" for row in _texts(table, _latex, r"\textbf{{{}}}")]
    note = f" {_latex(plain(table.note))}" if table.note else ""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(plain(table.title))}.{note}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        rf"{names} \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex(words: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in words)


def _texts(table: TableSection, quote: Callable[[str], str], bold: str) -> list[list[str]]:
    """The quoted texts of all cells, the best of each column made bold."""
    best = [best_rows(column, [row[i] for row in table.rows]) for i, column in enumerate(table.columns)]
    return [
        [
            bold.format(words) if place in best[i] else words
            for i, words in enumerate(
                quote(cell_text(cell, column)) for cell, column in zip(row, table.columns, strict=True)
            )
        ]
        for place, row in enumerate(table.rows)
    ]


TABLE_FORMATS: dict[str, Callable[[TableSection], str]] = {
    "csv": to_csv,
    "json": to_json,
    "md": to_markdown,
    "tex": to_latex,
}
