"""Grids from files, and small ones made of the words of a command line."""

from collections.abc import Sequence
from pathlib import Path

from voxdino.benchmark.grid import EncoderEntry, Grid, TaskEntry
from voxdino.core.errors import UsageError
from voxdino.core.io.options import ReadOptions
from voxdino.preparation.classification import is_classification_set, open_classification_set

QUICK_RESOLUTION = 112


def read_grid(data: Sequence[Path], root: Path | None) -> tuple[Grid, Path]:
    """A grid file and where its paths begin. Errors: UsageError for anything but one .json file; ConfigError."""
    if len(data) != 1 or data[0].suffix != ".json":
        fix = "give one grid file (GRID.json), or data sets with --encoders."
        raise UsageError(f"{len(data)} paths, none of them a grid", where=data[0], fix=fix)
    return Grid.read(data[0]), root or data[0].parent


def quick_grid(data: Sequence[Path], encoders: str, options: ReadOptions) -> Grid:
    """Every data set with the probe that suits it, at 112 pixels: linear, the mean of slices, or patches."""
    sources = [source.strip() for source in encoders.split(",") if source.strip()]
    if not sources:
        raise UsageError("no encoder is named", where="--encoders", fix="e.g. --encoders FILE,pixels:14.")
    tasks = []
    for path in data:
        known = open_classification_set(path) if is_classification_set(path) else None
        probe = "patch_linear" if known is None else "linear" if known.ndim == 2 else "slice_mean"
        name = path.resolve().stem if known is None else known.name
        tasks.append(
            TaskEntry(
                name=name, data=str(path.absolute()), probe=probe, resolutions=(QUICK_RESOLUTION,), read_options=options
            )
        )
    entries = tuple(
        EncoderEntry(name=Path(source).stem if "/" in source else source, source=source) for source in sources
    )
    return Grid.from_json(
        Grid.model_construct(title="A quick look", encoders=entries, tasks=tuple(tasks), seeds=(0,)).to_json(),
        where="--encoders",
    )
