"""MetaImage (.mha, and .mhd with its data beside it): raw or zlib, LPS turned to RAS, components made channels."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError, ImageError
from voxdino.core.geometry import Grid, require_right_angles
from voxdino.core.io.payload import read_payload, require_plausible
from voxdino.core.io.sniff import name_type
from voxdino.core.io.streams import GzipSource, PlainSource
from voxdino.core.safe_files import require_file, require_inside, write_atomic
from voxdino.core.volume import Volume

MAX_HEADER_BYTES = 1 << 16
_AGAIN = "export it again as MetaImage or NIfTI."
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_TYPE_NAMES = {kind: name for name, kind in _TYPES.items() if name not in ("MET_LONG", "MET_ULONG")}


@dataclass(frozen=True, eq=False)
class MetaHeader:
    """A checked header. sizes: fastest axis first, components excluded."""

    sizes: tuple[int, ...]
    channels: int
    dtype: np.dtype[Any]
    grid: Grid
    compressed: bool
    data: Path
    offset: int
    notes: tuple[str, ...]


def read(path: Path, *, max_bytes: int | None = None) -> Volume:
    """The file's values (C, x, y, z) in its own type. Errors: ImageError, GeometryError, SafetyError."""
    with _open(path) as (file, header):
        stored = (header.channels, *header.sizes)
        require_plausible(
            stored, header.dtype, path, offset=header.offset, file_size=header.data.stat().st_size,
            compressed=header.compressed, limit=max_bytes,
        )  # fmt: skip
        source = GzipSource(file, path, wbits=zlib.MAX_WBITS) if header.compressed else PlainSource(file)
        array = read_payload(source, math.prod(stored), header.dtype, path, offset=header.offset)
    return Volume(array.reshape(header.channels, *header.grid.shape, order="F"), header.grid, header.notes, path)


def read_grid(path: Path) -> tuple[Grid, int]:
    """Grid and number of channels, from the header alone."""
    with _open(path) as (_, header):
        return header.grid, header.channels


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write (C, x, y, z) as a compressed .mha in LPS."""
    if grid.ndim != 3:
        raise GeometryError("a picture has no place in space.", where=path, fix="write it as .png or .tif.")
    array = array.view(np.uint8) if array.dtype == np.bool_ else array
    kind = _TYPE_NAMES.get(array.dtype.str[1:])
    if kind is None:
        raise ImageError(f"MetaImage cannot hold {array.dtype}.", where=path, fix="convert it to float32.")
    packer = zlib.compressobj(4)
    packed = bytearray()
    for plane in array.T:  # (x, y, C) reversed: slices along z
        packed += packer.compress(np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("<")).tobytes())
    packed += packer.flush()
    lps = np.diag([-1.0, -1.0, 1.0]) @ grid.affine[:3]
    spacing = np.array(grid.spacing)
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {len(packed)}",
        f"TransformMatrix = {_join((lps[:, :3] / spacing).T.ravel())}",  # one axis after the other
        f"Offset = {_join(lps[:, 3])}",
        f"ElementSpacing = {_join(spacing)}",
        f"DimSize = {' '.join(str(size) for size in grid.shape)}",
        *([f"ElementNumberOfChannels = {len(array)}"] if len(array) > 1 else []),
        f"ElementType = {kind}",
        "ElementDataFile = LOCAL",
    ]
    with write_atomic(path) as temporary, temporary.open("wb") as file:
        file.write(("\n".join(lines) + "\n").encode("ascii"))
        file.write(packed)


def voxel_file(path: Path) -> Path:
    """The file that holds the voxels: `path` itself, or one beside it. Errors: ImageError, SafetyError."""
    return _find(path)[1]


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, MetaHeader]]:
    """The file that holds the voxels, standing at the first of them, and the header."""
    fields, data, offset = _find(path)
    with data.open("rb") as file:
        file.seek(offset)
        yield file, _header(fields, data, offset, path)


def _find(path: Path) -> tuple[dict[str, str], Path, int]:
    """The header's fields, the file that holds the voxels, and where they begin in it."""
    require_file(path, kind=ImageError)
    with path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    fields, end = _fields(head, path)
    name = fields["elementdatafile"]
    if name.upper().startswith("LIST") or "%" in name:
        raise ImageError("spreads its voxels over several files.", where=path, fix="save it as one .mha file.")
    local = name.upper() == "LOCAL"
    data = path if local else require_inside(path.parent, name)
    require_file(data, kind=ImageError)
    return fields, data, end if local else 0


def _fields(head: bytes, path: Path) -> tuple[dict[str, str], int]:
    """The header's fields, names in lower case, and where it ends."""
    fields: dict[str, str] = {}
    at = 0
    while (line_end := head.find(b"\n", at)) >= 0:
        name, equals, value = head[at:line_end].decode("latin-1").partition("=")
        at = line_end + 1
        if not equals or not name.strip().isidentifier():
            break
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            return fields, at
    if "ndims" not in fields and "objecttype" not in fields:
        fix = "give it the suffix of what it is."
        raise ImageError(f"is no MetaImage: it is {name_type(head[:512])}.", where=path, fix=fix)
    raise ImageError("truncated: the header has no ElementDataFile.", where=path, fix="copy or export it again.")


def _header(fields: dict[str, str], data: Path, offset: int, path: Path) -> MetaHeader:
    for name in ("ndims", "dimsize", "elementtype"):
        if name not in fields:
            raise ImageError(f"the header lacks '{name}'.", where=path, fix=_AGAIN)
    kind = _TYPES.get(fields["elementtype"].upper())
    if kind is None:
        raise ImageError(f"has voxels of type '{fields['elementtype']}'.", where=path, fix=_AGAIN)
    if fields.get("binarydata", "True").lower() != "true":
        raise ImageError("stores its voxels as text.", where=path, fix="save it as binary.")
    if fields.get("headersize", "0") != "0":
        raise ImageError(f"the header asks for 'HeaderSize = {fields['headersize']}'.", where=path, fix=_AGAIN)
    ndim = int(_numbers(fields, "ndims", 1, path)[0])
    if ndim not in (2, 3):
        raise ImageError(f"has {ndim} axes; one 3-D image is expected.", where=path, fix="save one frame as 3-D.")
    sizes = tuple(int(size) for size in _numbers(fields, "dimsize", ndim, path))
    channels = int(_numbers(fields, "elementnumberofchannels", 1, path, [1.0])[0])
    if min(*sizes, channels) < 1:
        raise ImageError(f"the header declares DimSize = {fields['dimsize']}.", where=path, fix=_AGAIN)
    big = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "False")).lower() == "true"
    try:
        grid, notes = _grid(fields, sizes, path)
        require_right_angles(grid)
    except GeometryError as error:
        raise GeometryError(error.fact, where=path, fix=error.fix) from None
    compressed = fields.get("compresseddata", "False").lower() == "true"
    dtype = np.dtype((">" if big else "<") + kind)
    return MetaHeader(sizes, channels, dtype, grid, compressed, data, offset, notes)


def _grid(fields: dict[str, str], sizes: tuple[int, ...], path: Path) -> tuple[Grid, tuple[str, ...]]:
    ndim = len(sizes)
    notes: list[str] = []
    spacing = _numbers(fields, "elementspacing", ndim, path, _numbers(fields, "elementsize", ndim, path, [1.0] * ndim))
    if min(spacing) <= 0:
        fix = "write the true spacing in mm into the header."
        raise GeometryError(f"the header's spacing is {' x '.join(f'{s:g}' for s in spacing)}.", fix=fix)
    matrix_name = next((n for n in ("transformmatrix", "rotation", "orientation") if n in fields), "")
    if not matrix_name:
        notes.append("orientation unknown: the header has no TransformMatrix; the axes are taken to run along L, P, S")
    matrix = np.array(_numbers(fields, matrix_name, ndim * ndim, path, list(np.eye(ndim).ravel()))).reshape(ndim, ndim)
    origin_name = next((n for n in ("offset", "position", "origin") if n in fields), "")
    affine = np.eye(4)
    affine[:ndim, :ndim] = matrix.T * spacing  # the file has one axis after the other
    affine[:ndim, 3] = _numbers(fields, origin_name, ndim, path, [0.0] * ndim)
    if ndim == 2:
        notes.append("2-D file, read as one slice")
    affine[:2] *= -1  # LPS -> RAS
    return Grid((*sizes, 1)[:3], affine), tuple(notes)


def _numbers(
    fields: dict[str, str], name: str, count: int, path: Path, default: list[float] | None = None
) -> list[float]:
    if name not in fields and default is not None:
        return default
    try:
        values = [float(text) for text in fields[name].split()]
        if len(values) == count and all(math.isfinite(value) for value in values):
            return values
    except ValueError:
        pass
    raise ImageError(f"the header's '{name}' is '{fields[name][:60]}'.", where=path, fix=_AGAIN)


def _join(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.17g}" for value in values)
