"""NIfTI-1 and NIfTI-2 single files: read whole, exact and within bounds; written like the image they belong to."""

import gzip
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError, ImageError
from voxdino.core.geometry import Grid, format_shape
from voxdino.core.io.nifti_header import NiftiHeader, read_header
from voxdino.core.io.payload import read_payload, require_plausible
from voxdino.core.io.sniff import name_type
from voxdino.core.io.streams import GzipSource, PlainSource, Source
from voxdino.core.safe_files import require_file, write_atomic
from voxdino.core.volume import Volume

SUFFIXES = (".nii.gz", ".nii")
PAIR_SUFFIXES = (".hdr", ".img", ".hdr.gz", ".img.gz")

_COMPRESS_LEVEL = 3


def read(path: Path, *, max_bytes: int | None = None, frames_as_channels: bool = False) -> Volume:
    """The file's values (C, x, y, z) in its own type, native byte order; float32 where the header sets a scale.

    RGB files give 3 channels, 2-D files one slice. Several frames are refused unless `frames_as_channels`.
    Errors: ImageError, GeometryError; SafetyError for sizes beyond memory (or `max_bytes`).
    """
    with _open(path) as (source, file_size):
        header = read_header(source, path)
        scaled = header.components == 1 and (header.slope, header.inter) != (1.0, 0.0)
        num_values = math.prod(header.stored_shape) * header.components
        require_plausible(
            (*header.stored_shape, header.components)[: None if header.components > 1 else -1], header.dtype, path,
            offset=header.offset, file_size=file_size, compressed=isinstance(source, GzipSource),
            extra_bytes=4 * num_values * scaled, limit=max_bytes,
        )  # fmt: skip
        if header.frames > 1 and not frames_as_channels:
            raise _several_frames(header, path)
        array = read_payload(source, num_values, header.dtype, path, offset=header.offset)
    array = array.reshape((header.components, *header.grid.shape, header.frames), order="F")
    array = array[..., 0] if header.frames == 1 else array[0].transpose(3, 0, 1, 2)  # (C, x, y, z)
    if scaled:
        array = _scale(array, header.slope, header.inter)
    return Volume(array, header.grid, header.notes, path)


def read_grid(path: Path) -> tuple[Grid, int]:
    """Grid and number of channels, from the header alone."""
    with _open(path) as (source, _):
        header = read_header(source, path)
    return header.grid, header.components * header.frames


def read_fields(path: Path) -> NiftiHeader:
    """The checked header."""
    with _open(path) as (source, _):
        return read_header(source, path)


def write(path: Path, array: NDArray[Any], grid: Grid, *, like: Path | None = None) -> None:
    """Write (C, x, y, z) values with their own type; one channel is 3-D, several are 4-D.

    like: a NIfTI file on the same grid whose transforms, codes, units and rank are kept. Its free text and
          extensions are not: they may name the patient. The same input gives the same bytes.
    """
    if grid.ndim != 3:
        raise GeometryError("a picture has no place in space.", where=path, fix="write it as .png or .tif.")
    fields = _new_fields(grid, like, len(array))
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    fields.set_data_dtype(array.dtype.newbyteorder("="))
    fields["vox_offset"] = 544 if isinstance(fields, Nifti2Header) and fields["sizeof_hdr"] == 540 else 352
    fields["scl_slope"], fields["scl_inter"] = 1.0, 0.0
    with write_atomic(path) as temporary, temporary.open("wb") as raw:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", _COMPRESS_LEVEL, raw, mtime=0) as packed:
                _write_to(packed.write, fields, array)
        else:
            _write_to(raw.write, fields, array)


def _write_to(write: Callable[[bytes], Any], fields: Any, array: NDArray[Any]) -> None:
    write(fields.binaryblock + b"\0\0\0\0")
    for channel in array:
        for plane in channel.T:  # slices along the last axis, Fortran order
            write(np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("<")).tobytes())


def _new_fields(grid: Grid, like: Path | None, channels: int) -> Any:
    """A fresh little-endian header; geometry copied bit by bit from `like` where that is given."""
    old = read_fields(like) if like is not None else None
    large = max(grid.shape) > np.iinfo(np.int16).max
    kind = type(old.fields) if old is not None else Nifti2Header if large else Nifti1Header
    fields = kind(endianness="<")
    if old is None:
        fields.set_data_shape((*grid.shape, channels) if channels > 1 else grid.shape)
        fields.set_sform(grid.affine, code=1)
        fields.set_qform(grid.affine, code=1)
        fields.set_xyzt_units("mm")
        return fields
    if old.grid.shape != grid.shape or not old.grid.same_as(grid):
        fact = f"{format_shape(grid.shape)} voxels do not lie on this file's grid of {format_shape(old.grid.shape)}."
        raise GeometryError(fact, where=like, fix="write the result on the grid of its image.")
    for name in (
        "dim", "pixdim", "xyzt_units", "dim_info", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
        "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
    ):  # fmt: skip
        fields[name] = old.fields[name]
    if old.frames != 1 or channels > 1:
        fields.set_data_shape((*grid.shape, channels) if channels > 1 else grid.shape)
    return fields


@contextmanager
def _open(path: Path) -> Iterator[tuple[Source, int]]:
    """The bytes of a .nii or .nii.gz file whose content is what its name says, and its size on disk."""
    size = require_file(path, kind=ImageError)
    named_gzip = path.name.lower().endswith(".gz")
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        is_gzip = head.startswith(b"\x1f\x8b")
        if named_gzip and not is_gzip:
            fix = "name it .nii." if "NIfTI" in name_type(head) else "give it the suffix of what it is."
            raise ImageError(f"is not gzip-compressed: it is {name_type(head)}.", where=path, fix=fix)
        if is_gzip and not named_gzip:
            raise ImageError("is a gzip file.", where=path, fix="name it .nii.gz.")
        yield GzipSource(file, path) if is_gzip else PlainSource(file), size


def _scale(array: NDArray[Any], slope: float, inter: float) -> NDArray[np.float32]:
    """slope * array + inter, computed in float64 slice by slice, kept as float32."""
    result = np.empty(array.shape, dtype=np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused later, with its count
        for index in range(array.shape[-1]):
            result[..., index] = array[..., index] * np.float64(slope) + inter
    return result


def _several_frames(header: NiftiHeader, path: Path) -> ImageError:
    sizes = format_shape(header.stored_shape)
    fact = f"has {header.frames} frames ({sizes}); one 3-D image is expected."
    fix = "pick one frame and save it as 3-D, or, if the frames are channels, save each as its own file."
    return ImageError(fact, where=path, fix=fix)
