"""What the header of a DICOM file says about its images, and nothing of what it says about the patient."""

import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread, read_dataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from voxdino.core.errors import ImageError, SafetyError, VoxdinoError
from voxdino.core.io.dicom.places import MAGIC, MAGIC_AT, BoundedFile, Place
from voxdino.core.safe_files import format_bytes

_MOST_INFLATED = 64 << 20  # bytes that a deflated file may come to
_MOST_NESTED = 50  # sequences in sequences
_ROOT_UID = "1.2.840.10008."  # of every storage class the standard knows
_FUNCTIONAL_GROUPS = (0x52009229, 0x52009230)
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
_NO_SCANS = ("RTDOSE", "RWV", "PR")
_AGAIN = "export or copy it again."

config.settings.reading_validation_mode = config.IGNORE  # its warnings quote values, which may be the patient's
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Plane:
    """Where a frame lies and what its numbers mean.

    position:    first pixel's centre, LPS millimetres.   orientation: unit vectors along a row and along a column.
    spacing:     (between rows, between columns) in mm; None where the header has none.
    thickness:   mm from one slice to the next, as the header says it; None where it does not.
    """

    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float


@dataclass(frozen=True, repr=False)
class Instance:
    """One DICOM file with pixels. Of its text only what is needed to group and to refer to it; `repr` shows none."""

    place: Place
    series_uid: str
    sop_uid: str
    sop_class: str
    has_study: bool
    series_number: int | None
    modality: str
    is_localizer: bool
    syntax: str
    is_implicit: bool
    is_little: bool
    pixel_offset: int
    rows: int
    columns: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    is_signed: bool
    is_float: bool
    is_inverted: bool
    padding: tuple[int, int] | None
    has_table: bool
    has_burned_in_text: bool
    planes: tuple[Plane, ...]

    @property
    def num_frames(self) -> int:
        return len(self.planes)


@dataclass(frozen=True, repr=False)
class Annotation:
    """A DICOM file that holds a segmentation or contours. series_uid: the series it was drawn on."""

    place: Place
    is_contours: bool
    series_uid: str


@contextmanager
def silently() -> Iterator[None]:
    """No warnings: those of the libraries quote values, which may be the patient's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Whatever a hostile or damaged file makes pydicom raise becomes an ImageError that quotes nothing of it."""
    try:
        yield
    except (VoxdinoError, OSError, MemoryError):
        raise
    except Exception as error:
        fact = f"cannot be read as DICOM ({type(error).__name__})."
        raise ImageError(fact, where=path, fix=_AGAIN) from error


def open_file(place: Place) -> BoundedFile:
    """The bytes of a DICOM file; of a deflated one, those of the same file without deflation.

    Errors: SafetyError where it inflates beyond measure.
    """
    file = place.open()
    try:
        if file.read(MAGIC_AT + 4)[MAGIC_AT:] == MAGIC:
            meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)  # type: ignore[arg-type]
            if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                with file:
                    return _inflated(file, meta, place.where)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _inflated(file: BoundedFile, meta: Dataset, where: Path) -> BoundedFile:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(file.read(), _MOST_INFLATED)
    if inflater.unconsumed_tail:
        fact = f"is deflated, and comes to more than {format_bytes(_MOST_INFLATED)}."
        raise SafetyError(fact, where=where, fix="store it uncompressed, or with compressed images (JPEG-LS, RLE).")
    if not inflater.eof:
        raise ImageError("truncated: its deflated data ends early.", where=where, fix=_AGAIN)
    plain = io.BytesIO()
    plain.write(b"\0" * MAGIC_AT + MAGIC)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    write_file_meta_info(plain, meta, enforce_standard=False)  # type: ignore[arg-type]
    plain.write(data)
    size = plain.tell()
    plain.seek(0)
    return BoundedFile(plain, size, where)


def read_header(place: Place) -> Instance | Annotation | None:
    """What a file is: images, an annotation, or something else (None: reports, plans, doses).

    Errors: ImageError for files that are damaged or contradict themselves; SafetyError.
    """
    with parsing(place.where):
        with open_file(place) as file:
            header = dcmread(file, stop_before_pixels=True, force=True)
            offset = file.tell()
        sop_class = str(header.get("SOPClassUID", ""))
        if not sop_class.startswith(_ROOT_UID) and "Rows" not in header:
            raise ImageError("is no DICOM image.", where=place.where, fix=_AGAIN)
        _require_shallow(header, place.where)
        if sop_class in _SEGMENTATIONS:
            return Annotation(place, False, _series_of_segmentation(header))
        if sop_class == _STRUCTURES:
            return Annotation(place, True, _series_of_structures(header))
        if "Rows" not in header and UID(sop_class).name.endswith("Image Storage"):
            fact = "truncated: its header ends before it describes the image."
            raise ImageError(fact, where=place.where, fix=_AGAIN)
        if "Rows" not in header or header.get("Modality") in _NO_SCANS:
            return None
        return read_instance(place, header, offset)


def read_instance(place: Place, header: Dataset, offset: int) -> Instance:
    """The facts of a file with pixels. offset: where its pixel data element begins."""
    bits, stored = int(header.BitsAllocated), int(header.get("BitsStored") or header.BitsAllocated)
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.get("SamplesPerPixel") or 1)
    num_frames = int(header.get("NumberOfFrames") or 1)
    odd = min(rows, columns, num_frames) < 1 or bits not in (1, 8, 16, 32, 64) or not 0 < stored <= bits
    if odd or samples not in (1, 3) or num_frames > 1 << 24:
        fact = f"declares {num_frames} frames of {columns} x {rows} pixels with {samples} x {bits} bits."
        raise ImageError(fact, where=place.where, fix=_AGAIN)
    is_signed = header.get("PixelRepresentation") == 1
    photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    is_implicit, is_little = header.original_encoding
    meta = header.file_meta
    default = "1.2.840.10008.1.2" if is_implicit else ExplicitVRLittleEndian if is_little else "1.2.840.10008.1.2.2"
    return Instance(
        place=place,
        series_uid=str(header.get("SeriesInstanceUID", "")),
        sop_uid=str(header.get("SOPInstanceUID", "")),
        sop_class=str(header.get("SOPClassUID", "")),
        has_study=bool(header.get("StudyInstanceUID")),
        series_number=_whole(header.get("SeriesNumber")),
        modality="".join(letter for letter in str(header.get("Modality", ""))[:16] if letter.isalnum()),
        is_localizer="LOCALIZER" in (str(word).upper() for word in header.get("ImageType") or ()),
        syntax=str(meta.get("TransferSyntaxUID", default)),
        is_implicit=bool(is_implicit),
        is_little=bool(is_little),
        pixel_offset=offset,
        rows=rows,
        columns=columns,
        samples=samples,
        photometric=photometric,
        bits_allocated=bits,
        bits_stored=stored,
        is_signed=is_signed,
        is_float="PixelRepresentation" not in header and bits >= 32,
        is_inverted=photometric == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE",
        padding=_padding(header, is_signed, bits),
        has_table=bool(header.get("ModalityLUTSequence")),
        has_burned_in_text=header.get("BurnedInAnnotation") == "YES",
        planes=read_planes(header, num_frames, place.where),
    )


def read_planes(header: Dataset, num_frames: int, where: Path) -> tuple[Plane, ...]:
    """One plane per frame: from the functional groups where there are any, else from the header itself."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if frames is None:
        return (_plane((header,), where),) * num_frames
    if len(frames) != num_frames:
        fact = f"describes {len(frames)} frames, but declares {num_frames}."
        raise ImageError(fact, where=where, fix=_AGAIN)
    return tuple(_plane((*_groups(frame), *_groups(shared), header), where) for frame in frames)


def _groups(item: Dataset) -> tuple[Dataset, ...]:
    names = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")
    return tuple(found[0] for name in names if (found := item.get(f"{name}Sequence")))


def _plane(groups: tuple[Dataset, ...], where: Path) -> Plane:
    def numbers(name: str, count: int) -> tuple[float, ...] | None:
        found = next((group[name].value for group in groups if name in group and group[name].value is not None), None)
        if found is None or (count > 1 and not len(found)):
            return None
        values = tuple(float(value) for value in (found if count > 1 else (found,)))
        if len(values) != count or not all(math.isfinite(value) for value in values):
            raise ImageError(f"its {name} is not {count} finite numbers.", where=where, fix=_AGAIN)
        return values

    position, orientation = numbers("ImagePositionPatient", 3), numbers("ImageOrientationPatient", 6)
    spacing = numbers("PixelSpacing", 2)
    if spacing is not None and min(spacing) <= 0:
        fact = f"its PixelSpacing is {spacing[0]:g} x {spacing[1]:g} mm."
        raise ImageError(fact, where=where, fix="write the true spacing into the header.")
    thickness = numbers("SpacingBetweenSlices", 1) or numbers("SliceThickness", 1)
    (slope,), (intercept,) = numbers("RescaleSlope", 1) or (1.0,), numbers("RescaleIntercept", 1) or (0.0,)
    return Plane(
        None if position is None else np.array(position),
        None if orientation is None else np.array(orientation),
        None if spacing is None else (spacing[0], spacing[1]),
        abs(thickness[0]) or None if thickness else None,
        slope,
        intercept,
    )


def _padding(header: Dataset, is_signed: bool, bits: int) -> tuple[int, int] | None:
    """Lowest and highest stored value that means "nothing was measured here"."""
    first = _whole(header.get("PixelPaddingValue"))
    if first is None:
        return None
    last = _whole(header.get("PixelPaddingRangeLimit"))
    values = [value for value in (first, last) if value is not None]
    if is_signed:  # some writers store it unsigned
        values = [value - (1 << bits) if value >= 1 << (bits - 1) else value for value in values]
    return min(values), max(values)


def _whole(value: Any) -> int | None:
    try:
        return None if value is None or value == "" else int(value)
    except (TypeError, ValueError):
        return None


def _series_of_segmentation(header: Dataset) -> str:
    return next((str(item.SeriesInstanceUID) for item in header.get("ReferencedSeriesSequence") or ()), "")


def _series_of_structures(header: Dataset) -> str:
    for frame in header.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            for item in study.get("RTReferencedSeriesSequence") or ():
                return str(item.SeriesInstanceUID)
    return ""


def _require_shallow(dataset: Dataset, where: Path, depth: int = 0) -> None:
    """ImageError for sequences nested without end, which no scanner writes."""
    if depth > _MOST_NESTED:
        raise ImageError(f"nests sequences more than {_MOST_NESTED} deep.", where=where, fix=_AGAIN)
    for tag in dataset.keys():  # noqa: SIM118 - iterating a data set would convert every value
        if tag not in _FUNCTIONAL_GROUPS and dataset.get_item(tag).VR in ("SQ", None):
            element = dataset[tag]
            for item in element.value if element.VR == "SQ" else ():
                _require_shallow(item, where, depth + 1)
