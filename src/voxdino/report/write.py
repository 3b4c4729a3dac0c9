"""A page as files: report.html, page.json and every table in four formats."""

import re
import unicodedata
from pathlib import Path

from voxdino.core.safe_files import write_json, write_text
from voxdino.report.html import render
from voxdino.report.page import ReportPage, TableSection
from voxdino.report.tables import TABLE_FORMATS

REPORT = "report.html"


def write_report(page: ReportPage, folder: Path) -> Path:
    """Write `page` into `folder` (report.html, page.json, tables/NN-title.csv, .json, .md, .tex); returns report.html.

    Each file is written whole or not at all, report.html last; files of the same names are replaced.
    Errors: ResourceError where it cannot be written.
    """
    tables = [section for section in page.sections if isinstance(section, TableSection)]
    for place, table in enumerate(tables, start=1):
        for suffix, write in TABLE_FORMATS.items():
            write_text(folder / "tables" / f"{place:02d}-{_slug(table.title)}.{suffix}", write(table))
    write_json(folder / "page.json", page.to_json())
    write_text(folder / REPORT, render(page))
    return folder / REPORT


def _slug(title: str) -> str:
    """ "dice-per-structure": a title as part of a file name that every system takes."""
    ascii_ = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_.lower()))[:48] or "table"
