"""Tables for other programs: nothing is lost, and no name becomes a formula, markup or a command."""

import csv
import io
import json

import pytest
from pages import HOSTILE, interval, page_of_all

from voxdino.report.page import Column, ReportPage, TableSection
from voxdino.report.tables import TABLE_FORMATS
from voxdino.report.write import write_report

TABLE = TableSection(
    title="Dice per structure",
    columns=(Column(title="name"), Column(title="Dice", digits=2, better="higher"), Column(title="n")),
    rows=(("a|b", interval(0.5), 3), ("50 % & more_x", interval(0.75), None), ("c", interval(None), 1)),
)


def named(*names: str) -> TableSection:
    return TableSection(title=names[0], columns=(Column(title=names[0]),), rows=tuple((name,) for name in names))


def test_csv_has_every_number_in_full_and_intervals_in_columns():
    rows = list(csv.reader(io.StringIO(TABLE_FORMATS["csv"](TABLE))))
    assert rows[0] == ["name", "Dice", "Dice low", "Dice high", "Dice undefined", "n"]
    assert rows[1][:2] == ["a|b", "0.5"] and float(rows[1][2]) == 0.45
    assert rows[2][-1] == "" and rows[3][1:4] == ["", "", ""]


@pytest.mark.parametrize("name", ["=cmd|'/C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_name_is_a_formula_for_a_spreadsheet(name):
    cells = [cell for row in csv.reader(io.StringIO(TABLE_FORMATS["csv"](named(name)), newline="")) for cell in row]
    assert all(not cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert cells[1] == f"'{name.strip()}"
    negative = TableSection(title="t", columns=(Column(title="x"),), rows=((-1.5,),))
    assert TABLE_FORMATS["csv"](negative) == "x\n-1.5\n"  # a number is no formula


def test_json_is_the_table():
    assert TableSection.from_json(json.loads(TABLE_FORMATS["json"](TABLE))) == TABLE


def test_markdown_keeps_its_columns_and_marks_the_best():
    lines = TABLE_FORMATS["md"](TABLE).splitlines()
    assert r"a\|b" in lines[4] and r"**0.75 \[0.70, 0.80\] \(1 undefined\)**" in lines[5]
    cells = [line.replace(r"\|", "").count("|") for line in lines[2:]]
    assert set(cells) == {4}
    assert "<script" not in TABLE_FORMATS["md"](named(HOSTILE, "x\n# y"))
    assert len(TABLE_FORMATS["md"](named("x\n# y")).splitlines()) == 5


def test_latex_escapes_every_sign_it_would_obey():
    told = TABLE_FORMATS["tex"](TABLE)
    assert r"50 \% \& more\_x & \textbf{0.75 [0.70, 0.80] (1 undefined)} & -- \\" in told
    assert r"\textbackslash{}input\{x\}\textasciicircum{}2\$" in TABLE_FORMATS["tex"](named(r"\input{x}^2$"))


def test_a_report_is_a_page_its_data_and_its_tables_all_inside_the_folder(tmp_path):
    page = page_of_all("../../escape")
    path = write_report(page, tmp_path / "report")
    assert path == tmp_path / "report" / "report.html" and path.read_text().startswith("<!DOCTYPE html>")
    assert ReportPage.read(tmp_path / "report" / "page.json") == page
    found = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    tables = [f"report/tables/01-escape.{suffix}" for suffix in ("csv", "json", "md", "tex")]
    assert found == ["report/page.json", "report/report.html", *tables]
    write_report(page, tmp_path / "report")  # again: the same files
