"""What every DICOM object that we write needs: the images it belongs to, its frames in their order, its labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from voxdino.core.errors import ImageError, LabelError
from voxdino.core.geometry import Grid, canonical_transpose
from voxdino.core.io.dicom.headers import silently
from voxdino.core.labels import LabelSet
from voxdino.core.segments import MOST_CHARACTERS
from voxdino.core.volume import LabelMap

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

PATIENT_TAGS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_IMAGE_TAGS = (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality",
    "FrameOfReferenceUID", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "SliceThickness", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """One class of a label map: its number in the array, and its name."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class Frames:
    """A label map in the order of its images' frames.

    array:  (F, R, C): frames along the images' normal, rows down, columns along, as in the images.
    affine: (frame, row, column) -> LPS millimetres.
    """

    array: NDArray[np.integer[Any]]
    affine: NDArray[np.float64]

    def points(self, frame: int, vertices: NDArray[np.float64]) -> NDArray[np.float64]:
        """LPS millimetres (N, 3) of (row, column) positions (N, 2) in a frame."""
        return vertices @ self.affine[:3, 1:3].T + self.affine[:3, :3] @ [frame, 0, 0] + self.affine[:3, 3]


def read_headers(files: Iterable[Callable[[], Any]], *, keep_patient: bool) -> list[Dataset]:
    """The headers of image files with nothing in them that an object of ours does not need.

    files: what opens each of them for reading bytes (`path.open` with "rb", a member of an archive).

    No private tags, no comments, no institution; the patient only with `keep_patient`: what is not read cannot leak.
    """
    wanted = (*_IMAGE_TAGS, *PATIENT_TAGS) if keep_patient else _IMAGE_TAGS
    headers: list[Dataset] = []
    for open_file in files:
        with open_file() as file, silently():
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(wanted), force=True)
        for name in PATIENT_TAGS:
            if name not in header:
                setattr(header, name, "")
        headers.append(header)
    return headers


def require_reference(headers: Sequence[Dataset]) -> None:
    """ImageError where the images lack the UIDs by which an object names what it belongs to."""
    for header in headers:
        missing = [name for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID") if not header.get(name)]
        if missing:
            raise no_reference(missing[0])


def no_reference(missing: str) -> ImageError:
    fact = f"the images have no {missing}, by which a DICOM object would refer to them."
    return ImageError(fact, fix="write --format nifti.")


def to_frames(labels: LabelMap, headers: Sequence[Dataset]) -> Frames:
    """The label map, on whatever order of axes, as frames of the images' orientation. Volumes only."""
    cosines = np.array([float(value) for value in _orientation(headers[0])])
    along_columns, along_rows = cosines[:3], cosines[3:]  # of a growing column index, of a growing row index
    towards = np.stack([np.cross(along_columns, along_rows), along_rows, along_columns]) @ RAS_TO_LPS[:3, :3]
    change = np.eye(4)
    change[:3, :3] = towards
    order, flips = canonical_transpose(Grid(labels.grid.shape, change @ labels.grid.affine), (0, 1, 2))
    grid = labels.grid.transposed(order, flips)
    array = labels.array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return Frames(array, RAS_TO_LPS @ grid.affine)


def list_segments(labels: LabelMap, classes: LabelSet | None) -> tuple[Segment, ...]:
    """The classes of the label map, also those that it shows nowhere: they were looked for.

    Without `classes`, "label 3" for every value. Errors: LabelError where there is nothing to name.
    """
    if classes is not None:
        return tuple(Segment(label, name[:MOST_CHARACTERS]) for name, label in classes.foreground)
    values = [int(value) for value in np.unique(labels.array) if value]
    if not values:
        raise LabelError("holds no label, and nothing says which were looked for.", fix="write it as .nii.gz.")
    return tuple(Segment(value, f"label {value}") for value in values)


def _orientation(header: Dataset) -> Sequence[Any]:
    """ImageOrientationPatient, of a multi-frame file its first frame's."""
    groups = [header]
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for item in list(header.get(name, []))[:1]:
            groups += list(item.get("PlaneOrientationSequence", []))[:1]
    for group in groups:
        if group.get("ImageOrientationPatient"):
            orientation: Sequence[Any] = group.ImageOrientationPatient
            return orientation
    raise ImageError("the images state no orientation.", fix="write --format nifti.")
