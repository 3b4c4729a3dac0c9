"""DICOM in: series of a folder, an archive or a file as volumes; segmentations and contours as label maps.

Patients' names, identifiers and free text are never kept: what leaves this package is voxels, a grid, and notes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxdino.core.geometry import Grid
from voxdino.core.io.dicom.headers import silently
from voxdino.core.io.dicom.labels import read_labels
from voxdino.core.io.dicom.places import is_scan
from voxdino.core.io.dicom.read import read, read_grid
from voxdino.core.io.dicom.series import Series, choose_series, group_series, look_into

__all__ = ["Series", "SourceSeries", "is_scan", "list_series", "read", "read_grid", "read_labels", "source_series"]


@dataclass(frozen=True, repr=False)
class SourceSeries:
    """The files of an image that was read, for those who write what refers to them. `repr` shows nothing of it.

    paths, sop_uids, sop_classes, frames: per slice of the grid, in its order: the file, and the frame in it from 1.
    positions:   (slices, 3) LPS millimetres of each slice's first pixel, as stored.
    orientation: unit vectors along a row and along a column, LPS.
    grid:        of the image as it is read; where `is_tilted`, its slices are not those of the files.
    """

    series_uid: str
    paths: tuple[Path, ...]
    sop_uids: tuple[str, ...]
    sop_classes: tuple[str, ...]
    frames: tuple[int, ...]
    positions: NDArray[np.float64]
    orientation: tuple[float, ...]
    grid: Grid
    is_tilted: bool


def list_series(path: Path) -> tuple[Series, ...]:
    """The series of images in a folder, an archive or a file, by number. Errors: ImageError, SafetyError."""
    with silently():
        return group_series(look_into(path))


def source_series(path: Path, series: str | None = None) -> SourceSeries:
    """Which files an image comes from, slice by slice. Errors: as `read`."""
    with silently():
        stack = choose_series(look_into(path), series)
    planes = stack.planes
    positions = [np.zeros(3) if plane.position is None else plane.position for plane in planes]
    return SourceSeries(
        series_uid=stack.instances[0].series_uid,
        paths=tuple(file.place.where for file in stack.instances),
        sop_uids=tuple(file.sop_uid for file in stack.instances),
        sop_classes=tuple(file.sop_class for file in stack.instances),
        frames=tuple(index + 1 for index in stack.indices),
        positions=np.array(positions),
        orientation=() if planes[0].orientation is None else tuple(map(float, planes[0].orientation)),
        grid=stack.grid,
        is_tilted=stack.shear != (0.0, 0.0),
    )
