"""Reading and writing images and label maps: one table from suffix to format, one function per question."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import ImageError, LabelError, ResourceError, SafetyError
from voxdino.core.geometry import Grid
from voxdino.core.io import metaimage, nifti, nrrd
from voxdino.core.io.options import NanPolicy, ReadOptions
from voxdino.core.io.values import note_inexact, require_finite, to_whole_numbers
from voxdino.core.labels import map_values
from voxdino.core.safe_files import digest_file, digest_json, digest_path
from voxdino.core.volume import LabelMap, Volume

__all__ = [
    "DICOM_SUFFIXES",
    "READERS",
    "NanPolicy",
    "ReadOptions",
    "digest_image",
    "image_files",
    "image_suffix",
    "is_image",
    "is_scan",
    "read_grid",
    "read_label_map",
    "read_volume",
    "reading",
    "write_label_map",
    "write_volume",
]

DICOM_SUFFIXES = (".dcm", ".dicom")  # DICOM files may have any name, or none; see `is_scan`

_NO_FAULT_OF_THE_FILE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)


@dataclass(frozen=True)
class Format:
    """How one kind of file is read and written.

    read:        (path, max_bytes, frames_as_channels, series) -> Volume in the file's own values, NaN and all.
    read_labels: (path, options, like) -> Volume of one channel with the label values.
    read_grid:   (path, series) -> grid and number of channels.
    write:       (path, (C, *spatial), grid, like); None where we only read.
    voxel_file:  path -> the file that holds the voxels, which may be another one; None where it never is.
    """

    read: Callable[[Path, int | None, bool, str | None], Volume]
    read_labels: Callable[[Path, ReadOptions, Path | None], Volume]
    read_grid: Callable[[Path, str | None], tuple[Grid, int]]
    write: Callable[[Path, NDArray[Any], Grid, Path | None], None] | None
    voxel_file: Callable[[Path], Path] | None = None


def _read_picture(path: Path, max_bytes: int | None, frames_as_channels: bool, series: str | None) -> Volume:
    from voxdino.core.io import pictures

    return pictures.read(path)


def _read_picture_labels(path: Path, options: ReadOptions, like: Path | None) -> Volume:
    from voxdino.core.io import pictures

    return pictures.read_labels(path, options)


def _read_picture_grid(path: Path, series: str | None) -> tuple[Grid, int]:
    from voxdino.core.io import pictures

    return pictures.read_grid(path)


def _write_picture(path: Path, array: NDArray[Any], grid: Grid, like: Path | None) -> None:
    from voxdino.core.io import pictures

    pictures.write(path, array, grid)


def _read_dicom(path: Path, max_bytes: int | None, frames_as_channels: bool, series: str | None) -> Volume:
    from voxdino.core.io import dicom

    return dicom.read(path, max_bytes=max_bytes, series=series)


def _read_dicom_labels(path: Path, options: ReadOptions, like: Path | None) -> Volume:
    from voxdino.core.io import dicom

    return dicom.read_labels(path, options, None if like is None else read_grid(like, series=options.series)[0])


def _read_dicom_grid(path: Path, series: str | None) -> tuple[Grid, int]:
    from voxdino.core.io import dicom

    return dicom.read_grid(path, series=series)


def _like_nifti(like: Path | None) -> Path | None:
    return like if like is not None and image_suffix(like) in nifti.SUFFIXES else None


_NIFTI = Format(
    lambda path, limit, frames, _: nifti.read(path, max_bytes=limit, frames_as_channels=frames),
    lambda path, *_: nifti.read(path),
    lambda path, _: nifti.read_grid(path),
    lambda path, array, grid, like: nifti.write(path, array, grid, like=_like_nifti(like)),
)
_NRRD = Format(
    lambda path, limit, frames, _: nrrd.read(path, max_bytes=limit, frames_as_channels=frames),
    lambda path, *_: nrrd.read(path),
    lambda path, _: nrrd.read_grid(path),
    lambda path, array, grid, _: nrrd.write(path, array, grid),
    nrrd.voxel_file,
)
_META = Format(
    lambda path, limit, *_: metaimage.read(path, max_bytes=limit),
    lambda path, *_: metaimage.read(path),
    lambda path, _: metaimage.read_grid(path),
    lambda path, array, grid, _: metaimage.write(path, array, grid),
    metaimage.voxel_file,
)
_DICOM = Format(_read_dicom, _read_dicom_labels, _read_dicom_grid, None)
_PICTURE = Format(_read_picture, _read_picture_labels, _read_picture_grid, _write_picture)

READERS: dict[str, Format] = {
    ".nii.gz": _NIFTI,
    ".nii": _NIFTI,
    ".nrrd": _NRRD,
    ".nhdr": replace(_NRRD, write=None),
    ".mha": _META,
    ".mhd": replace(_META, write=None),
    ".png": _PICTURE,
    ".tif": _PICTURE,
    ".tiff": _PICTURE,
    **dict.fromkeys(DICOM_SUFFIXES, _DICOM),
    **dict.fromkeys((".jpg", ".jpeg", ".bmp", ".gif"), replace(_PICTURE, write=None)),
}


def is_scan(path: str | PathLike[str]) -> bool:
    """Whether a folder or an archive holds DICOM files, or a file of any name is one: by the first bytes of some."""
    from voxdino.core.io import dicom

    return dicom.is_scan(Path(path))


def image_suffix(path: str | PathLike[str]) -> str:
    """The suffix that says the format, in lower case: ".nii.gz", ".png"; "" where no known format has it."""
    name = Path(path).name.lower()
    return max((suffix for suffix in READERS if name.endswith(suffix)), key=len, default="")


def is_image(path: str | PathLike[str]) -> bool:
    """Whether the name is one of an image we can read (the content is not looked at)."""
    return bool(image_suffix(path))


def image_files(path: str | PathLike[str]) -> list[Path]:
    """Every file that an image consists of: all in a folder; the voxels too where they lie beside their header.

    Voxels that are not there, or of a header that cannot be read, are left out: reading the image tells about them.
    """
    image = Path(path)
    if image.is_dir():
        return sorted(file for file in image.rglob("*") if file.is_file())
    form = READERS.get(image_suffix(image))
    if form is not None and form.voxel_file is not None:
        with suppress(ImageError, SafetyError, OSError):
            return list(dict.fromkeys((image, form.voxel_file(image))))
    return [image]


def digest_image(path: str | PathLike[str]) -> str:
    """As `digest_path`; where the voxels lie beside their header, the digest of both. Errors: OSError."""
    image = Path(path)
    files = [image] if image.is_dir() else image_files(image)
    return digest_json([digest_file(file) for file in files]) if len(files) > 1 else digest_path(image)


def read_volume(
    path: str | PathLike[str],
    *,
    nan_policy: NanPolicy = "refuse",
    max_bytes: int | None = None,
    frames_as_channels: bool = False,
    series: str | None = None,
) -> Volume:
    """An image (C, *spatial) in the file's own values and type; float32 only where the file itself sets a scale.

    nan_policy:         see ReadOptions.
    max_bytes:          the most that the decoded image may take; None: 90 % of the free memory.
    frames_as_channels: read the frames of a 4-D file as channels in place of refusing it.
    series:             see ReadOptions.
    `path` may also be a folder or a zip archive with a DICOM series.
    Errors: ImageError, GeometryError; SafetyError for sizes over the limit.
    """
    file = Path(path)
    with reading(file):
        volume = _format(file).read(file, max_bytes, frames_as_channels, series)
    array, notes = require_finite(volume.array, nan_policy, file)
    return Volume(array, volume.grid, (*volume.notes, *notes, *note_inexact(array)), file)


def read_label_map(
    path: str | PathLike[str], *, options: ReadOptions | None = None, like: str | PathLike[str] | None = None
) -> LabelMap:
    """A label map (*spatial) of integers, exact also beyond 2^53, with the options' value mapping applied.

    like: the image it belongs to, on whose grid DICOM segmentations and contours are put; no other format needs it.
    Errors: LabelError for values that are no whole numbers, lossy files, colour; ImageError, GeometryError.
    """
    file = Path(path)
    chosen = options or ReadOptions()
    with reading(file):
        volume = _format(file).read_labels(file, chosen, None if like is None else Path(like))
    if volume.num_channels != 1:
        fact = f"has {volume.num_channels} channels; a label map has one number per voxel."
        raise LabelError(fact, where=file, fix="save the labels as one channel of integers.")
    array = to_whole_numbers(volume.array[0], file)
    if chosen.label_map:
        array = map_values(array, chosen.label_map)
    return LabelMap(array, volume.grid, volume.notes, file)


def read_grid(path: str | PathLike[str], *, series: str | None = None) -> tuple[Grid, int]:
    """Grid and number of channels (frames count as channels), from the header alone. series: see ReadOptions."""
    file = Path(path)
    with reading(file):
        return _format(file).read_grid(file, series)


def write_label_map(path: str | PathLike[str], labels: LabelMap, *, like: str | PathLike[str] | None = None) -> None:
    """Write a label map atomically in the smallest unsigned integer type that holds it.

    like: the image it belongs to. NIfTI: its transforms, codes, units and rank are kept.
    Errors: LabelError for negative values; ResourceError when the disk is full.
    """
    array = labels.array
    if array.size and array.min() < 0:
        raise LabelError(f"holds the label {array.min()}.", where=path, fix="labels are 0 or more.")
    smallest = np.min_scalar_type(int(array.max()))
    _write(Path(path), array.astype(smallest, copy=False)[None], labels.grid, like)


def write_volume(path: str | PathLike[str], volume: Volume, *, like: str | PathLike[str] | None = None) -> None:
    """Write an image atomically with its own values and type. like: as `write_label_map`."""
    _write(Path(path), volume.array, volume.grid, like)


def _write(path: Path, array: NDArray[Any], grid: Grid, like: str | PathLike[str] | None) -> None:
    write = _format(path).write
    if write is None:
        known = ", ".join(suffix for suffix, form in READERS.items() if form.write)
        raise ImageError(f"{image_suffix(path)} files are only read.", where=path, fix=f"write one of {known}.")
    write(path, array, grid, None if like is None else Path(like))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses while reading `path`, in our words: the file's fault, unless it would hit any file.

    Errors: ImageError; ResourceError where memory or open files end.
    """
    try:
        with np.errstate(all="ignore"):  # damaged headers overflow; what comes out is checked
            yield
    except OSError as error:
        fact = f"cannot be read ({error.strerror or error})."
        if error.errno in _NO_FAULT_OF_THE_FILE:
            raise ResourceError(fact, where=path, fix="close other programs, or raise the limits.") from error
        raise ImageError(fact, where=path, fix="check its permissions and the disk it is on.") from error
    except MemoryError as error:
        fix = "close other programs, or use a machine with more memory."
        raise ResourceError("does not fit into memory.", where=path, fix=fix) from error


def _format(path: Path) -> Format:
    suffix = image_suffix(path)
    if path.is_dir() or (not suffix and is_scan(path)):
        return _DICOM
    if suffix:
        return READERS[suffix]
    if path.name.lower().endswith(nifti.PAIR_SUFFIXES):
        fact = "is half of an Analyze or NIfTI pair (.hdr/.img)."
        raise ImageError(fact, where=path, fix="convert it to a single .nii.gz file.")
    ending = f"'{path.suffix}' is no image format we know" if path.suffix else "the name has no suffix"
    raise ImageError(f"{ending}.", where=path, fix=f"known formats: {', '.join(READERS)}.")
