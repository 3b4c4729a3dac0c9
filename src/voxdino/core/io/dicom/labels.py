"""Segmentations (SEG) and contours (RTSTRUCT) as label maps on the grid of the images that they were drawn on."""

from pathlib import Path

from voxdino.core.errors import GeometryError, LabelError
from voxdino.core.geometry import Grid
from voxdino.core.io.dicom.contours import read_structures
from voxdino.core.io.dicom.headers import Annotation, parsing, silently
from voxdino.core.io.dicom.read import read
from voxdino.core.io.dicom.segments import read_segmentation
from voxdino.core.io.dicom.series import Contents, look_into
from voxdino.core.io.dicom.stack import stack_frames
from voxdino.core.io.options import ReadOptions
from voxdino.core.volume import Volume


def read_labels(path: Path, options: ReadOptions, like: Grid | None = None) -> Volume:
    """The label map in a SEG or RTSTRUCT file, or in the folder or archive that holds one; else an image's values.

    like: the grid of the image that it belongs to. None: that of the series it was drawn on, where the same folder
    has it; a SEG file alone: the grid that its frames span.
    Labels are the numbers of the segments (SEG) or regions (RTSTRUCT), unless options.segments names others.
    Errors: LabelError where segments overlap and options.segments does not say which wins; GeometryError.
    """
    with silently():
        contents = look_into(path)
        if not contents.annotations:
            return read(path, series=options.series)
        if len(contents.annotations) > 1:
            fact = f"holds {len(contents.annotations)} segmentations or structure sets."
            raise LabelError(fact, where=path, fix="give the file of one of them.")
        annotation = contents.annotations[0]
        if like is None:
            like = _source_grid(annotation, contents)
        if annotation.is_contours:
            if like is None:
                fact = "holds contours, and the images they were drawn on are not beside it."
                raise GeometryError(fact, where=path, fix="put it into the folder of its images, or name the image.")
            with parsing(annotation.place.where):
                return read_structures(annotation.place, like, options.segments)
        with parsing(annotation.place.where):
            return read_segmentation(annotation.place, like, options.segments)


def _source_grid(annotation: Annotation, contents: Contents) -> Grid | None:
    """The grid of the series that was drawn on, if it is beside the annotation."""
    if contents.path.is_file() and annotation.is_contours and annotation.place.member is None:
        contents = look_into(contents.path.parent, is_deep=False)
    members = [file for file in contents.instances if file.series_uid == annotation.series_uid]
    return stack_frames(members, contents.path).grid if members else None
