"""Which series a folder, an archive or a file holds, and which one is meant."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from voxdino.core.errors import ImageError, SafetyError, VoxdinoError
from voxdino.core.geometry import Unit, format_shape, format_spacing
from voxdino.core.io.dicom.headers import Annotation, Instance, parsing, read_header
from voxdino.core.io.dicom.pixels import map_files
from voxdino.core.io.dicom.places import DICOMDIR, MAGIC, MAGIC_AT, Place, find_places, is_dicom, open_index
from voxdino.core.io.dicom.stack import Stack, stack_frames

_MOST_LISTED = 20
_MOST_REMEMBERED = 32  # paths; of a scan of 500 files, a megabyte
_STEADY_NS = 2_000_000_000  # a file younger than that may change again under the same time


@dataclass(frozen=True, repr=False)
class Series:
    """One series, without any text about the patient.

    number:   what `--series` calls it: its own number where those differ, else its position.
    size:     voxels per array axis, () where it cannot be stacked.   spacing: their lengths in `unit`.
    problem:  why it cannot be read, "" where it can.
    """

    number: int
    uid: str
    modality: str
    num_files: int
    is_localizer: bool
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    unit: Unit
    problem: str
    instances: tuple[Instance, ...] = field(default=(), compare=False)

    def describe(self) -> str:
        """ "3: CT, 512 x 512 x 90 voxels at 0.8 x 0.8 x 5 mm, 90 files"."""
        kind = f"{self.modality or 'unknown'}{' localizer' if self.is_localizer else ''}"
        grid = f"{format_shape(self.size)} voxels at {format_spacing(self.spacing, self.unit)}" if self.size else "odd"
        return f"{self.number}: {kind}, {grid}, {self.num_files} file{'s' * (self.num_files != 1)}"


@dataclass(frozen=True, repr=False)
class Contents:
    """What a folder, an archive or a file holds. num_others: files that are neither images nor annotations."""

    path: Path
    instances: tuple[Instance, ...]
    annotations: tuple[Annotation, ...]
    num_others: int
    has_index: bool

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.num_others:
            notes.append(f"{self.num_others} other file{'s' * (self.num_others != 1)} in the folder left aside")
        if self.has_index:
            notes.append("the DICOMDIR is not followed; the files themselves are read")
        return tuple(notes)


def look_into(path: Path, *, is_deep: bool = True) -> Contents:
    """What the headers of all files say; is_deep: also of those in folders below.

    They are read once for as long as names, sizes and times of all files stay as they were.
    Errors: ImageError for a damaged DICOM file; SafetyError.
    """
    places = tuple(find_places(path, is_deep=is_deep))
    found = [file.stat() for file in dict.fromkeys(place.path for place in places)]
    if time.time_ns() - max((file.st_mtime_ns for file in found), default=0) < _STEADY_NS:
        return _read_headers(path, places)
    stamps = tuple((file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino) for file in found)
    return _remembered(path, places, stamps)


@lru_cache(maxsize=_MOST_REMEMBERED)
def _remembered(path: Path, places: tuple[Place, ...], stamps: tuple[tuple[int, ...], ...]) -> Contents:
    return _read_headers(path, places)


def _read_headers(path: Path, places: tuple[Place, ...]) -> Contents:
    index = [place for place in places if place.where.name.upper() == DICOMDIR]
    for place in index:
        _require_harmless(place)
    candidates = [place for place in places if place not in index and _is_candidate(place)]
    if not candidates and places == (Place(path),):
        raise ImageError("is no DICOM file.", where=path, fix="give it the suffix of what it is.")
    found = [header for header in map_files(read_header, candidates) if header is not None]
    images = tuple(header for header in found if isinstance(header, Instance))
    annotations = tuple(header for header in found if isinstance(header, Annotation))
    return Contents(path, images, annotations, len(places) - len(found) - len(index), bool(index))


def _is_candidate(place: Place) -> bool:
    head = place.head()
    return is_dicom(head) and (head[MAGIC_AT:] == MAGIC or place.where.suffix.lower() in ("", ".dcm", ".dicom", ".ima"))


def _require_harmless(place: Place) -> None:
    """SafetyError for a DICOMDIR that names files outside of its folder, although it is not followed."""
    with parsing(place.where):
        for names in open_index(place):
            if any(part in ("..", ".") or "/" in part or "\\" in part or ":" in part for part in names):
                fact = "is a DICOMDIR that leads outside of its folder."
                raise SafetyError(fact, where=place.where, fix="remove it: the images are read without it.")


def group_series(contents: Contents) -> tuple[Series, ...]:
    """The series of images, by their numbers; localizers are a series of their own."""
    groups: dict[tuple[str, bool], list[Instance]] = {}
    for instance in contents.instances:
        groups.setdefault((instance.series_uid, instance.is_localizer), []).append(instance)
    ordered = sorted(groups.items(), key=lambda item: (item[1][0].series_number or 0, item[0]))
    numbers = [members[0].series_number for _, members in ordered]
    if len(set(numbers)) < len(numbers) or None in numbers:
        numbers = list(range(1, len(ordered) + 1))
    describe = partial(_describe, path=contents.path)
    return tuple(describe(members, number or 0) for (_, members), number in zip(ordered, numbers, strict=True))


def _describe(members: list[Instance], number: int, *, path: Path) -> Series:
    first = members[0]
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    unit: Unit = "mm"
    try:
        grid = stack_frames(members, path).grid
        size, spacing, unit, problem = grid.shape, grid.spacing, grid.unit, ""
    except VoxdinoError as error:
        problem = error.fact
    return Series(
        number, first.series_uid, first.modality, len(members), first.is_localizer, size, spacing, unit, problem,
        tuple(members),
    )  # fmt: skip


def choose_series(contents: Contents, wanted: str | None) -> Stack:
    """The frames of the series meant, stacked. wanted: its number or its UID; None where there is only one.

    Errors: ImageError listing the series where several are there; GeometryError where they make no volume.
    """
    series = group_series(contents)
    if not series:
        fact = "is a folder that holds no DICOM image." if contents.path.is_dir() else "holds no DICOM image."
        raise ImageError(fact, where=contents.path, fix="give the folder of the images, or one image file.")
    chosen = [one for one in series if wanted in (None, str(one.number), one.uid)]
    if len(chosen) != 1:
        raise _ask(series, wanted, contents.path)
    return stack_frames(chosen[0].instances, contents.path, contents.notes)


def _ask(series: Sequence[Series], wanted: str | None, path: Path) -> ImageError:
    listed = "; ".join(one.describe() for one in series[:_MOST_LISTED])
    more = f"; and {len(series) - _MOST_LISTED} more" if len(series) > _MOST_LISTED else ""
    fact = f"holds {len(series)} series" if wanted is None else f"has no series {wanted}; there are {len(series)}"
    return ImageError(f"{fact} ({listed}{more}).", where=path, fix="choose one with --series NUMBER.")
