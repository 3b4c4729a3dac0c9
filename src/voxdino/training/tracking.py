"""What a run tells while it runs: log.jsonl, curves.png, a progress bar on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxdino.core.errors import CheckpointError
from voxdino.core.safe_files import write_atomic, write_text

Row = dict[str, Any]


class RunLog:
    """log.jsonl: a line per step ({"step", "loss", ...}) and per validation ({"step", "dice", ...}).

    Lines hold no clock times, so a resumed run's log is identical to an uninterrupted one's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Every whole line; a line cut by a kill is not one. Errors: CheckpointError for a line that is no row."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [self._row(line, number) for number, line in enumerate(lines, 1)]

    def rewind(self, step: int, validated_step: int) -> None:
        """Forget what the checkpoint of `step`, last validated at `validated_step`, knows nothing of."""
        last = {False: step, True: step if validated_step == step else step - 1}
        kept = [row for row in self.rows() if row["step"] <= last["dice" in row]]
        write_text(self.path, "".join(_line(row) for row in kept))

    def _row(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("step"), int)
            or ("dice" in row) != isinstance(row.get("per_class"), dict)
        ):
            fix = "delete this line: it is only told there, the training goes on from its checkpoint."
            raise CheckpointError(f"line {number} is damaged.", where=self.path, fix=fix)
        return row

    def append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Event:
    """One thing that happened, for whoever shows it: kind "note", "encode", "step", "validation", "checkpoint".

    done, total: progress of what goes on now; text: one line for people.
    """

    kind: str
    text: str = ""
    done: int = 0
    total: int = 0


Listener = Callable[[Event], None]


@contextmanager
def show_progress(listener: Listener | None = None) -> Iterator[Listener]:
    """`listener` itself, or one that shows a bar with the time left on stderr (lines, where stderr is no terminal)."""
    if listener is not None:
        yield listener
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {kind: progress.add_task(kind, total=None, visible=False) for kind in ("encode", "step")}

        def show(event: Event) -> None:
            if event.kind in tasks:
                progress.update(
                    tasks[event.kind],
                    completed=event.done,
                    total=event.total,
                    description=event.text,
                    visible=event.done < event.total,
                )
            else:
                console.print(event.text, highlight=False)

        yield show


def draw_curves(rows: Sequence[Row], path: Path, *, title: str, measure: str = "Dice") -> None:
    """Loss (faint: every step, strong: smoothed) and validation measure per class over the steps, as a PNG."""
    from matplotlib.figure import Figure  # 0.5 s to import, and pyplot would keep global state

    steps = [row for row in rows if row.get("loss") is not None]
    validations = [row for row in rows if "dice" in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    x, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    left.plot(x, losses, color="#9bb7d4", linewidth=0.7)
    left.plot(x, _smooth(losses), color="#1f4e79", linewidth=2, label="loss (smoothed)")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    x = [row["step"] for row in validations]
    for name in validations[-1]["per_class"] if validations else ():
        right.plot(x, [row["per_class"][name] for row in validations], linewidth=1, alpha=0.8, label=name)
    right.plot(x, [row["dice"] for row in validations], "o-", color="#1f4e79", linewidth=2, markersize=4, label="mean")
    known = [value for row in validations for value in (row["dice"], *row["per_class"].values()) if value is not None]
    right.set(xlabel="step", ylabel=f"validation {measure}", ylim=(max(0.0, min(known, default=0.0) - 0.05), 1))
    if validations and len(validations[-1]["per_class"]) <= 12:
        right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean, share = [], 0.0, 0.0
    for value in values:
        mean, share = weight * mean + (1 - weight) * value, weight * share + (1 - weight)
        smoothed.append(mean / share)
    return smoothed
