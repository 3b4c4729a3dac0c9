"""An image or a label map in memory, with the grid it lies on and what its reader had to do to it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError
from voxdino.core.geometry import Grid, format_shape


@dataclass(frozen=True, eq=False)
class Volume:
    """An image: (C, *spatial) in the file's own values, never normalised.

    notes:  what the reader did or noticed, one sentence each ("EXIF rotation applied").
    source: the file it came from, if any.
    """

    array: NDArray[Any]
    grid: Grid
    notes: tuple[str, ...] = ()
    source: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.array.shape[1:] != self.grid.shape:
            raise GeometryError(
                f"an array of {format_shape(self.array.shape[1:])} voxels does not fit a grid of "
                f"{format_shape(self.grid.shape)}",
                where=self.source,
            )

    @property
    def num_channels(self) -> int:
        return int(self.array.shape[0])


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Integer labels (*spatial), in the file's own ids."""

    array: NDArray[np.integer[Any]]
    grid: Grid
    notes: tuple[str, ...] = ()
    source: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape:
            raise GeometryError(
                f"a label map of {format_shape(self.array.shape)} voxels does not fit a grid of "
                f"{format_shape(self.grid.shape)}",
                where=self.source,
            )
