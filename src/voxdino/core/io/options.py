"""How the user said to treat odd files; stored in plan.json so that every command reads them the same way."""

from typing import Literal

from voxdino.core.records import Record

NanPolicy = Literal["refuse", "fill"]


class ReadOptions(Record):
    """Answers to the questions that odd files raise. The defaults refuse.

    nan_policy:         "fill" replaces NaN and -infinity by the smallest finite value, +infinity by the largest.
    label_map:          (value in the file, value meant) pairs, applied to every label map: ((255, 1),).
    lossy_threshold:    JPEG masks: a grey value above it is 1, else 0. None refuses lossy label files.
    geometry_tolerance: mm by which grids that must agree may differ. None: 1 % of a voxel.
    trust_array_order:  image and label of equal shape lie on each other whatever their headers say.
    allow_external:     paths in a data set's description may leave its folder.
    series:             DICOM: the series to read where a folder holds several, by its number or its UID.
    segments:           DICOM SEG and RTSTRUCT: (name or number in the file, label) pairs; the others are not read, and
                        where some overlap the later one wins. (): every segment, by its own number.
    """

    nan_policy: NanPolicy = "refuse"
    label_map: tuple[tuple[int, int], ...] = ()
    lossy_threshold: int | None = None
    geometry_tolerance: float | None = None
    trust_array_order: bool = False
    allow_external: bool = False
    series: str | None = None
    segments: tuple[tuple[str, int], ...] = ()
