"""DICOM in: series of a folder, an archive or a file as volumes; segmentations and contours as label maps.

Patients' names, identifiers and free text are never kept: what leaves this package is voxels, a grid, and notes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from voxdino.core.io.dicom.headers import open_file, silently
from voxdino.core.io.dicom.labels import read_labels
from voxdino.core.io.dicom.places import BoundedFile, is_scan
from voxdino.core.io.dicom.read import read, read_grid
from voxdino.core.io.dicom.series import Series, choose_series, group_series, look_into

__all__ = ["Series", "is_scan", "list_series", "missing_reference", "read", "read_grid", "read_labels", "source_files"]


def list_series(path: Path) -> tuple[Series, ...]:
    """The series of images in a folder, an archive or a file, by number. Errors: ImageError, SafetyError."""
    with silently():
        return group_series(look_into(path))


def missing_reference(path: Path, series: str | None = None) -> str:
    """The UID without which no DICOM object can refer to the image, "" where all are there. Errors: as `read`."""
    with silently():
        instances = choose_series(look_into(path), series).instances
    there = {
        "StudyInstanceUID": all(one.has_study for one in instances),
        "SeriesInstanceUID": all(one.series_uid for one in instances),
        "SOPInstanceUID": all(one.sop_uid for one in instances),
    }
    return next((name for name, is_there in there.items() if not is_there), "")


def source_files(path: Path, series: str | None = None) -> tuple[Callable[[], BoundedFile], ...]:
    """What opens each file that an image is read from, in the order of its slices. Errors: as `read`."""
    with silently():
        stack = choose_series(look_into(path), series)
    places = dict.fromkeys(instance.place for instance in stack.instances)  # of many frames in one file, once
    return tuple(partial(open_file, place) for place in places)
