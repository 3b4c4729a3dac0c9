"""What the long commands print when they are done."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from voxdino.cli.output import format_seconds, relative
from voxdino.core.errors import PartialError
from voxdino.core.geometry import format_shape, format_spacing
from voxdino.core.io import read_grid
from voxdino.core.safe_files import read_json
from voxdino.core.shards import Shard
from voxdino.evaluation.classified import ClassScores
from voxdino.evaluation.report import lesion_table, report_table
from voxdino.evaluation.scores import Scores
from voxdino.inference.ledger import record_name
from voxdino.inference.run import RECORD_NAME, PredictSummary
from voxdino.preparation.case import Case

MAX_LINES = 20  # cases told one by one


def print_inputs(cases: Sequence[Case]) -> None:
    """Per case its grid, read from the header alone."""
    for case in cases[:MAX_LINES]:
        grid, _ = read_grid(case.images[0])
        print(f"{case.id}  {format_shape(grid.shape)} at {format_spacing(grid.spacing, grid.unit)}")
    if len(cases) > MAX_LINES:
        print(f"... and {len(cases) - MAX_LINES} more")


def print_predictions(summary: PredictSummary, cases: Sequence[Case]) -> None:
    """Per case its grid and the volumes found; then where they are."""
    folder = Path(summary.folder)
    for case in cases[:MAX_LINES]:
        found = summary.record.cases[case.id]
        grid, _ = read_grid(case.images[0])
        volumes = ", ".join(f"{name} {format_volume(value)} {found.unit}" for name, value in found.volumes.items())
        print(f"{found.output}  {format_shape(grid.shape)} at {format_spacing(grid.spacing, grid.unit)}: {volumes}")
    if len(cases) > MAX_LINES:
        print(f"... and {len(cases) - MAX_LINES} more, all in {relative(folder / RECORD_NAME)}")
    kept = f", {summary.num_kept} were there already" if summary.num_kept else ""
    print(f"{summary.num_done} cases in {format_seconds(summary.elapsed_s)}{kept}: {relative(folder)}")


def format_volume(value: float) -> str:
    """ "1 482" and "12.3": whole numbers with thin groups from a hundred on, one decimal below."""
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else f"{value:.1f}"


def partial_result(folder: Path, shard: Shard | None = None) -> dict[str, Any]:
    """What predictions.json (of the shard) says after some cases failed."""
    return {"folder": str(folder), "record": read_json(folder / record_name(shard))}


def print_scores(scores: Scores) -> None:
    """The table of scores on stdout, that of lesions below it; at full width where stdout is no terminal."""
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(report_table(scores))
    if scores.lesions:
        console.print(lesion_table(scores))


def error_of(scores: Scores | ClassScores, where: Path) -> PartialError | None:
    """The error of the cases that could not be scored, if any."""
    if not scores.failed:
        return None
    total = scores.num_cases + len(scores.failed)
    told = "; ".join(failed.message for failed in scores.failed)
    fix = "correct these files and run the same command again."
    return PartialError(f"{len(scores.failed)} of {total} cases could not be scored: {told}", where=where, fix=fix)
