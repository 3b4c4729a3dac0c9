"""CSV tables that describe data sets: every fault is an error with its line."""

import csv
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from voxdino.core.errors import DatasetError, ResourceError
from voxdino.core.records import nearest
from voxdino.core.safe_files import require_file


def read_table(
    path: Path, known: Sequence[str], *, required: Sequence[str]
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns, and (line, row) of every row that is not empty. Columns that are not known stay.

    Errors: DatasetError for a missing or misspelt column and rows of another length; ResourceError.
    """
    require_file(path, kind=DatasetError)  # opening a named pipe would wait for ever
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise DatasetError(f"is not UTF-8 text ({error.reason}).", where=path, fix="save it as UTF-8.") from None
    except OSError as error:
        fix = "check the permissions."
        raise ResourceError(f"cannot be read ({error.strerror}).", where=path, fix=fix) from error
    except csv.Error as error:
        raise DatasetError(f"is no CSV table ({error}).", where=path, fix="save it as CSV with commas.") from None
    for wanted in required:
        if wanted not in columns:
            fact = f"has the columns {', '.join(columns) or 'none'}, but no '{wanted}'.{nearest(wanted, columns)}"
            named = ",".join(name for name in known if name != "id")
            raise DatasetError(fact, where=path, fix=f"the first line names the columns: {named}.")
    for column in columns:
        if columns.count(column) > 1:
            raise DatasetError(f"the column '{column}' is there twice.", where=path, fix="remove one of them.")
        absent = [name for name in known if name not in columns]
        meant = get_close_matches(column, absent, n=1, cutoff=0.75) if column not in known else []
        if meant:
            fact = f"unknown column '{column}'. Did you mean '{meant[0]}'?"
            raise DatasetError(fact, where=path, fix="rename the column, or remove it.")
    odd = [line for line, row in rows if len(row) != len(columns)]
    if odd:
        fact = f"line {odd[0]} does not have {len(columns)} cells ({len(odd)} such lines)."
        raise DatasetError(fact, where=path, fix="give every row one cell per column.")
    return columns, [(line, dict(zip(columns, (cell.strip() for cell in row), strict=True))) for line, row in rows]
