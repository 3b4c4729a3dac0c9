"""The curves of a pretraining: every loss term, and what was watched, over the steps."""

from collections.abc import Sequence
from pathlib import Path

from voxdino.core.safe_files import write_atomic
from voxdino.training.tracking import Row

HIDDEN = frozenset({"step", "stage", "skipped", "watch"})
COLUMNS = 3
DRAW_EVERY_S = 30.0
DRAW_SHARE = 0.02  # of the time that drawing may take


def pause_after(took_s: float) -> float:
    """Seconds until the curves are drawn again: the log that is read for it grows with the run."""
    return max(DRAW_EVERY_S, took_s / DRAW_SHARE)


def draw_loss_curves(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """One small plot per number of the log, as a PNG."""
    from matplotlib.figure import Figure  # 0.5 s to import, and pyplot would keep global state

    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in {**row, **row.get("watch", {})}.items():
            if name not in HIDDEN and isinstance(value, int | float):
                series.setdefault(name, []).append((row["step"], value))
    if not series:
        return
    num_rows = -(-len(series) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * num_rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for number, (name, points) in enumerate(series.items(), 1):
        axes = figure.add_subplot(num_rows, COLUMNS, number)
        few = len(points) < 60
        axes.plot(*zip(*points, strict=True), "o-" if few else "-", color="#1f4e79", linewidth=1, markersize=3)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
