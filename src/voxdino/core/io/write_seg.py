"""DICOM SEG through highdicom: frames in place, coded segments, references to the images that they were made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import highdicom
import numpy as np
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from voxdino import __version__
from voxdino.core.errors import LabelError
from voxdino.core.io.dicom_output import DicomOutput
from voxdino.core.io.dicom_target import Segment, list_segments, require_reference, to_frames
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import write_atomic
from voxdino.core.segments import segment_code, segment_colour
from voxdino.core.volume import LabelMap

MOST_BINARY_SEGMENTS = 16  # from 17 segments on one frame per slice holds all of them (LABELMAP)
MOST_LABEL = 65535

Encoding = Literal["auto", "binary", "labelmap"]


def write(
    path: Path,
    labels: LabelMap,
    headers: Sequence[Dataset],
    classes: LabelSet | None,
    output: DicomOutput,
    encoding: Encoding = "auto",
) -> None:
    """Write a label map as a DICOM segmentation of the images whose `headers` these are.

    BINARY has a frame per segment and slice, segments numbered from 1 in the order of the classes, empty frames left
    out: every viewer reads it, but many segments make it large and slow. LABELMAP (Supplement 243, of 2024) has a frame
    per slice with the label map's own numbers; newer viewers read it. "auto": BINARY up to 16 segments.

    Every call makes a new instance: fresh UIDs, the time of writing.
    Errors: LabelError for labels over 65535 or without a class, ImageError for images without UIDs, ResourceError.
    """
    require_reference(headers)
    segments = list_segments(labels, classes)
    as_binary = len(segments) <= MOST_BINARY_SEGMENTS if encoding == "auto" else encoding == "binary"
    numbers = {segment.id: number if as_binary else segment.id for number, segment in enumerate(segments, start=1)}
    _require_known(labels, numbers)
    pixels, is_empty = _pixels(labels, headers, numbers)
    kind = SegmentationTypeValues.BINARY if as_binary else SegmentationTypeValues.LABELMAP
    seg = Segmentation(
        source_images=list(headers),
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=[
            _describe(segment, numbers[segment.id], index, output)
            for index, segment in sorted(enumerate(segments), key=lambda item: numbers[item[1].id])
        ],
        series_instance_uid=generate_uid(prefix=None),
        series_number=1,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="voxdino",
        manufacturer_model_name=output.model[:64],
        software_versions=__version__,
        device_serial_number=output.version[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian if as_binary else RLELossless,
        omit_empty_frames=as_binary and not is_empty,
        content_label="SEGMENTATION",
        specific_character_set="ISO_IR 192",
        series_description="Segmentation by voxdino",
    )
    with write_atomic(path) as temporary:
        seg.save_as(temporary)


def _require_known(labels: LabelMap, numbers: dict[int, int]) -> None:
    largest = int(labels.array.max())
    if largest > MOST_LABEL or max(numbers) > MOST_LABEL:
        fact = f"holds the label {max(largest, *numbers)}; DICOM SEG goes up to {MOST_LABEL}."
        raise LabelError(fact, fix="write --format nifti.")
    is_known = np.zeros(largest + 1, bool)
    is_known[[0, *(label for label in numbers if label <= largest)]] = True
    for plane in labels.array:
        if not is_known[plane].all():
            fact = f"holds the label {plane[~is_known[plane]][0]}, which no class has."
            raise LabelError(fact, fix="declare it as a class.")


def _pixels(
    labels: LabelMap, headers: Sequence[Dataset], numbers: dict[int, int]
) -> tuple[highdicom.Volume | NDArray[Any], bool]:
    """The segment numbers, in place (a picture: as its image lies), and whether there are none."""
    table = np.zeros(max(*numbers, int(labels.array.max())) + 1, np.min_scalar_type(max(numbers.values())))
    for label, number in numbers.items():
        table[label] = number
    if labels.grid.ndim == 2:
        array = table[labels.array][None]
        return array, not array.any()
    frames = to_frames(labels, headers)
    array = table[frames.array]
    frame_of_reference = headers[0].get("FrameOfReferenceUID")
    return highdicom.Volume(array, frames.affine, "PATIENT", frame_of_reference), not array.any()


def _describe(segment: Segment, number: int, index: int, output: DicomOutput) -> SegmentDescription:
    code = segment_code(segment.name)
    description = SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=code.category,
        segmented_property_type=code.type,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=output.model[:64], family=codes.DCM.ArtificialIntelligence, version=output.version[:64]
        ),
        tracking_uid=generate_uid(prefix=None),
        tracking_id=segment.name,
        anatomic_regions=None if code.region is None else [code.region],
        display_color=highdicom.color.CIELabColor.from_rgb(*segment_colour(index)),
    )
    if code.side is not None:
        side = highdicom.sr.CodedConcept.from_code(code.side)
        if code.region is None:
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
        else:
            description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [side]
    return description
