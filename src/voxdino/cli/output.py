"""How results look: tidy lines and tables on stdout, talk and progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxdino.cli.faults import PartlyFailedError
from voxdino.core.errors import VoxdinoError

if TYPE_CHECKING:
    from voxdino.cohort.dispatch import Cohort


def say(text: str) -> None:
    """Talk to the user beside the results: on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout. NaN must have become None before."""
    print(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))


def end(result: dict[str, Any], error: VoxdinoError | None, *, as_json: bool) -> None:
    """The end of a command: its result as JSON if asked, and the error of the cases that failed."""
    if error is not None:
        raise PartlyFailedError(error, result) from error
    if as_json:
        print_json(result)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: the first column and texts to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        is_text = index == 0 or any(len(row[index].split()) > 6 for row in rows)
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, markup=False, highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def format_seconds(seconds: float) -> str:
    """ "4.1 s", "3 min 20 s", "1 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def relative(path: Path) -> str:
    """The path as seen from here where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def cohort_on(where: str, device: str) -> "Cohort":
    """The workers of --on, which compute on `device` (never "auto").

    Errors: UsageError, and ResourceError where they cannot be had.
    """
    from voxdino.cohort.crew import parse_crew
    from voxdino.cohort.dispatch import Cohort

    return Cohort(parse_crew(where, num_gpus=1.0 if device == "cuda" else 0.0), on_note=say)


@contextmanager
def counting(text: str, *, tell: bool = False, what: str = "cases") -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, gone when done; yields the callback (done, total, ...) that libraries call.

    tell: where nobody watches (no terminal), say now and then how far it is and how fast it goes, in `what`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if tell and not console.is_terminal:
        from voxdino.cohort.pace import Pace

        yield Pace(say, what=what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total, *_: progress.update(task, completed=done, total=total)
