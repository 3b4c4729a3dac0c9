"""DICOM RTSTRUCT: every label a region of interest of closed planar contours, on the planes of its images."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from voxdino import __version__
from voxdino.core.errors import GeometryError, ImageError
from voxdino.core.io.contours import trace_polygons
from voxdino.core.io.dicom_output import DicomOutput
from voxdino.core.io.dicom_target import (
    PATIENT_TAGS,
    Frames,
    Segment,
    list_segments,
    require_reference,
    to_frames,
)
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import write_atomic
from voxdino.core.segments import segment_code, segment_colour
from voxdino.core.volume import LabelMap

NEAR_MM = 0.01  # an image this near to a contour's plane is the one it was drawn on

_CONTOUR_DATA = Tag("ContourData")
_DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"  # SOP class that RT Referenced Study Sequence names (retired, as used)


def write(
    path: Path, labels: LabelMap, headers: Sequence[Dataset], classes: LabelSet | None, output: DicomOutput
) -> None:
    """Write a label map as a structure set of the images whose `headers` these are.

    Contours run along voxel edges (see `trace_polygons`), one CLOSED_PLANAR polygon for each piece that hangs together
    in a slice, holes joined by keyholes: area, volume and centroid are those of the label map, and filling a contour
    gives its voxels back. Coordinates are written to 1e-5 mm. A label that is nowhere is an ROI without contours.

    Every call makes a new instance: fresh UIDs, the time of writing.
    Errors: GeometryError for pictures, ImageError for images without UIDs or frame of reference, ResourceError.
    """
    if labels.grid.ndim == 2:
        raise GeometryError("a picture has no place in space.", fix="write --format png or dicom-seg.")
    require_reference(headers)
    if not headers[0].get("FrameOfReferenceUID"):
        raise ImageError("the images name no frame of reference.", fix="write --format nifti.")
    segments = list_segments(labels, classes)
    frames = to_frames(labels, headers)
    dataset = _about(headers[0], output)
    dataset.ReferencedFrameOfReferenceSequence = [_frame_of_reference(headers)]
    dataset.StructureSetROISequence = [
        _roi(number, segment, headers[0]) for number, segment in enumerate(segments, start=1)
    ]
    planes = _images_of_frames(frames, headers)
    dataset.ROIContourSequence = [
        _contours(number, segment, frames, planes) for number, segment in enumerate(segments, start=1)
    ]
    dataset.RTROIObservationsSequence = [
        _observation(number, segment) for number, segment in enumerate(segments, start=1)
    ]
    with write_atomic(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


def _about(image: Dataset, output: DicomOutput) -> Dataset:
    """Patient, study, series, equipment and structure set: everything but the structures."""
    now = datetime.now()
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for name in PATIENT_TAGS:
        setattr(dataset, name, image.get(name, ""))
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None)
    dataset.StudyInstanceUID = image.StudyInstanceUID
    dataset.SeriesInstanceUID = generate_uid(prefix=None)
    dataset.Modality = "RTSTRUCT"
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.SeriesDescription = "Structure set by voxdino"
    dataset.OperatorsName = ""
    dataset.FrameOfReferenceUID = image.FrameOfReferenceUID
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = "voxdino"
    dataset.ManufacturerModelName = output.model[:64]
    dataset.DeviceSerialNumber = output.version[:64]
    dataset.SoftwareVersions = __version__
    dataset.StructureSetLabel = "voxdino"
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset.InstanceCreationDate = dataset.SeriesDate = dataset.StructureSetDate = date
    dataset.InstanceCreationTime = dataset.SeriesTime = dataset.StructureSetTime = time
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _frame_of_reference(headers: Sequence[Dataset]) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = headers[0].SeriesInstanceUID
    series.ContourImageSequence = [_reference(header) for header in headers]
    study = Dataset()
    study.ReferencedSOPClassUID = _DETACHED_STUDY
    study.ReferencedSOPInstanceUID = headers[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = headers[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _reference(header: Dataset, frame: int | None = None) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = header.SOPClassUID
    reference.ReferencedSOPInstanceUID = header.SOPInstanceUID
    if frame is not None:
        reference.ReferencedFrameNumber = frame
    return reference


def _roi(number: int, segment: Segment, image: Dataset) -> Dataset:
    roi = Dataset()
    roi.ROINumber = number
    roi.ReferencedFrameOfReferenceUID = image.FrameOfReferenceUID
    roi.ROIName = segment.name
    roi.ROIGenerationAlgorithm = "AUTOMATIC"
    return roi


def _observation(number: int, segment: Segment) -> Dataset:
    code = segment_code(segment.name)
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIInterpretedType = "ORGAN" if code.kind == "anatomy" else ""
    observation.ROIInterpreter = ""
    observation.RTROIIdentificationCodeSequence = [_code(code.type)]
    return observation


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _contours(number: int, segment: Segment, frames: Frames, planes: dict[int, Dataset]) -> Dataset:
    roi = Dataset()
    roi.ReferencedROINumber = number
    roi.ROIDisplayColor = list(segment_colour(number - 1))
    contours = []
    for frame, vertices in _polygons(frames, segment.id):
        contour = Dataset()
        if frame in planes:
            contour.ContourImageSequence = [planes[frame]]
        contour.ContourGeometricType = "CLOSED_PLANAR"
        contour.NumberOfContourPoints = len(vertices)
        numbers = [f"{value:.5f}" for value in frames.points(frame, vertices).reshape(-1)]
        contour[_CONTOUR_DATA] = DataElement(_CONTOUR_DATA, "DS", numbers, already_converted=True)  # 10 times as fast
        contours.append(contour)
    if contours:
        roi.ContourSequence = contours
    return roi


def _polygons(frames: Frames, label: int) -> Iterator[tuple[int, Any]]:
    """(frame, corners) of every polygon of a label, each traced in the smallest box that holds it."""
    for frame, plane in enumerate(frames.array):
        mask = plane == label
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            for vertices in trace_polygons(box):
                yield frame, vertices + np.array((rows[0], columns[0]))


def _images_of_frames(frames: Frames, headers: Sequence[Dataset]) -> dict[int, Dataset]:
    """Frame -> reference to the image that lies in its plane. Frames between the images have none."""
    normal = np.cross(frames.affine[:3, 2], frames.affine[:3, 1])
    normal /= np.linalg.norm(normal)
    heights = (frames.affine[:3, 3] + np.outer(np.arange(len(frames.array)), frames.affine[:3, 0])) @ normal
    found: dict[int, Dataset] = {}
    for position, reference in _positions(headers):
        offsets = np.abs(heights - position @ normal)
        if offsets.min() <= NEAR_MM:
            found[int(offsets.argmin())] = reference
    return found


def _positions(headers: Sequence[Dataset]) -> Iterator[tuple[Any, Dataset]]:
    """Position (LPS mm) of every image, or of every frame of a multi-frame file, with a reference to it."""
    for header in headers:
        if "PerFrameFunctionalGroupsSequence" in header:
            for number, groups in enumerate(header.PerFrameFunctionalGroupsSequence, start=1):
                for item in groups.get("PlanePositionSequence", []):
                    yield np.array(item.ImagePositionPatient, dtype=np.float64), _reference(header, number)
        elif header.get("ImagePositionPatient"):
            yield np.array(header.ImagePositionPatient, dtype=np.float64), _reference(header)
