"""NRRD images (.nrrd, and .nhdr with its data beside it): raw or gzip, LPS turned to RAS, components made channels."""

import gzip
import math
import re
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

MAX_HEADER_BYTES = 1 << 20
_AGAIN = "export it again as NRRD or NIfTI."
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_TYPE_NAMES = {"i1": "int8", "u1": "uint8", "i2": "int16", "u2": "uint16", "i4": "int32", "u4": "uint32",
               "i8": "int64", "u8": "uint64", "f4": "float", "f8": "double"}  # fmt: skip
_TO_RAS = {  # space -> signs of its world axes
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
}
_COMPONENT_KINDS = re.compile(r"vector|\d-vector|covariant-vector|(rgb|rgba|hsv|xyz)-color|\d-color")


@dataclass(frozen=True, eq=False)
class NrrdHeader:
    """A checked header. sizes: fastest axis first. channel_axis: the one without a direction, if any."""

    sizes: tuple[int, ...]
    dtype: np.dtype[Any]
    grid: Grid
    channel_axis: int | None
    is_frames: bool
    compressed: bool
    data: Path
    offset: int
    notes: tuple[str, ...]


def read(path: Path, *, max_bytes: int | None = None, frames_as_channels: bool = False) -> Volume:
    """The file's values (C, x, y, z) in its own type. Errors: ImageError, GeometryError, SafetyError."""
    with _open(path) as (file, header):
        channels = 1 if header.channel_axis is None else header.sizes[header.channel_axis]
        if header.is_frames and channels > 1 and not frames_as_channels:
            fix = "pick one frame and save it as 3-D, or, if the frames are channels, save each as its own file."
            raise ImageError(f"has {channels} frames; one 3-D image is expected.", where=path, fix=fix)
        require_plausible(
            header.sizes, header.dtype, path, offset=header.offset, file_size=header.data.stat().st_size,
            compressed=header.compressed, limit=max_bytes,
        )  # fmt: skip
        source = GzipSource(file, path) if header.compressed else PlainSource(file)
        array = read_payload(source, math.prod(header.sizes), header.dtype, path, offset=header.offset)
    array = array.reshape(header.sizes, order="F")
    if header.channel_axis is not None:
        array = np.moveaxis(array, header.channel_axis, 0)
    return Volume(array.reshape(channels, *header.grid.shape, order="F"), header.grid, header.notes, path)


def read_grid(path: Path) -> tuple[Grid, int]:
    """Grid and number of channels, from the header alone."""
    with _open(path) as (_, header):
        return header.grid, 1 if header.channel_axis is None else header.sizes[header.channel_axis]


def write(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write (C, x, y, z) as a gzip-compressed NRRD in LPS; channels become the fastest axis."""
    if grid.ndim != 3:
        raise GeometryError("a picture has no place in space.", where=path, fix="write it as .png or .tif.")
    array = array.view(np.uint8) if array.dtype == np.bool_ else array
    kind = _TYPE_NAMES.get(array.dtype.str[1:])
    if kind is None:
        raise ImageError(f"NRRD cannot hold {array.dtype}.", where=path, fix="convert it to float32.")
    lps = np.diag([-1.0, -1.0, 1.0]) @ grid.affine[:3]
    directions = [f"({','.join(f'{value:.17g}' for value in lps[:, axis])})" for axis in range(3)]
    several = len(array) > 1
    sizes = (len(array), *grid.shape) if several else grid.shape
    lines = [
        "NRRD0004",
        f"type: {kind}",
        f"dimension: {len(sizes)}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(str(size) for size in sizes)}",
        f"space directions: {' '.join(['none'] * several + directions)}",
        f"kinds: {' '.join(['vector'] * several + ['domain'] * 3)}",
        "endian: little",
        "encoding: gzip",
        f"space origin: ({','.join(f'{value:.17g}' for value in lps[:, 3])})",
    ]
    with write_atomic(path) as temporary, temporary.open("wb") as raw:
        raw.write(("\n".join(lines) + "\n\n").encode("ascii"))
        with gzip.GzipFile("", "wb", 4, raw, mtime=0) as packed:
            for plane in array.T:  # (x, y, C) reversed: slices along z
                packed.write(np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("<")).tobytes())


def voxel_file(path: Path) -> Path:
    """The file that holds the voxels: `path` itself, or one beside it. Errors: ImageError, SafetyError."""
    return _find(path)[1]


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, NrrdHeader]]:
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
    if not head.startswith(b"NRRD"):
        fix = "give it the suffix of what it is."
        raise ImageError(f"is no NRRD image: it is {name_type(head[:512])}.", where=path, fix=fix)
    end = re.search(rb"\r?\n\r?\n", head)
    fields = _fields(head[: end.start() if end else len(head)], path)
    detached = fields.get("data file", fields.get("datafile"))
    if end is None and detached is None:
        raise ImageError("truncated: the header has no end.", where=path, fix="copy or export it again.")
    if detached is not None and (detached.upper().startswith("LIST") or "%" in detached):
        raise ImageError("spreads its voxels over several files.", where=path, fix="save it as one .nrrd file.")
    data = path if detached is None else require_inside(path.parent, detached)
    require_file(data, kind=ImageError)
    return fields, data, 0 if detached is not None or end is None else end.end()


def _fields(head: bytes, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in head.decode("latin-1").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if line.startswith("#") or not colon or value.startswith("="):
            continue  # comments and key/value pairs, which may be about the patient
        if name.strip().lower() in fields:
            raise ImageError(f"the header gives '{name.strip()}' twice.", where=path, fix=_AGAIN)
        fields[name.strip().lower()] = value.strip()
    return fields


def _header(fields: dict[str, str], data: Path, offset: int, path: Path) -> NrrdHeader:
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise ImageError(f"the header lacks '{name}'.", where=path, fix=_AGAIN)
    kind = _TYPES.get(fields["type"].lower())
    if kind is None:
        raise ImageError(f"has voxels of type '{fields['type']}'.", where=path, fix=_AGAIN)
    endian = fields.get("endian", "little" if kind[1] == "1" else "")
    if endian not in ("little", "big"):
        raise ImageError("the header lacks the byte order ('endian').", where=path, fix=_AGAIN)
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ImageError(f"has the encoding '{encoding}'.", where=path, fix="save it with raw or gzip encoding.")
    for name in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(name, "0") != "0":
            raise ImageError(f"the header asks for '{name}: {fields[name]}'.", where=path, fix=_AGAIN)
    sizes = tuple(int(size) for size in _numbers(fields, "sizes", path))
    if len(sizes) != int(_numbers(fields, "dimension", path)[0]) or min(sizes) < 1 or not 2 <= len(sizes) <= 4:
        fact = f"the header declares dimension {fields['dimension']} and sizes {fields['sizes']}."
        raise ImageError(fact, where=path, fix=_AGAIN)
    try:
        grid, channel_axis, notes = _grid(fields, sizes, path)
        require_right_angles(grid)
    except GeometryError as error:
        raise GeometryError(error.fact, where=path, fix=error.fix) from None
    kinds = fields.get("kinds", "").lower().split()
    is_component = (
        channel_axis is not None and len(kinds) == len(sizes) and _COMPONENT_KINDS.fullmatch(kinds[channel_axis])
    )
    dtype = np.dtype(("<" if endian == "little" else ">") + kind)
    return NrrdHeader(sizes, dtype, grid, channel_axis, not is_component, encoding != "raw", data, offset, notes)


def _grid(fields: dict[str, str], sizes: tuple[int, ...], path: Path) -> tuple[Grid, int | None, tuple[str, ...]]:
    """The grid, the axis that is no axis of space, and notes."""
    notes: list[str] = []
    world = int(_numbers(fields, "space dimension", path)[0]) if "space dimension" in fields else 3
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", ""))
    if directions and len(directions) != len(sizes):
        raise ImageError(f"the header gives {len(directions)} directions.", where=path, fix=_AGAIN)
    if directions:
        spatial = [axis for axis, text in enumerate(directions) if text != "none"]
        vectors = [_vector(directions[axis], path) for axis in spatial]
        world = len(vectors[0]) if vectors else world
    else:
        first = 1 if len(sizes) == 4 and _COMPONENT_KINDS.match(fields.get("kinds", "").lower()) else 0
        spatial = list(range(first, first + min(3, len(sizes))))
        spacings = _numbers(fields, "spacings", path) if "spacings" in fields else [1.0] * len(sizes)
        if len(spacings) != len(sizes):
            raise ImageError(f"the header gives {len(spacings)} spacings.", where=path, fix=_AGAIN)
        vectors = [list(np.eye(world)[i] * spacings[axis]) for i, axis in enumerate(spatial)]
        notes.append("orientation unknown: the header has no directions; the axes are taken to run along L, P, S")
    if len(sizes) - len(spatial) > 1 or not 2 <= len(spatial) <= 3 or world not in (2, 3):
        fact = f"has {len(spatial)} axes of space among {len(sizes)}."
        raise ImageError(fact, where=path, fix="save it as one 3-D image.")
    origin = _vector(fields["space origin"], path) if "space origin" in fields else [0.0] * world
    if any(len(vector) != world for vector in (*vectors, origin)):
        raise ImageError("directions and origin have different lengths.", where=path, fix=_AGAIN)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, vector in enumerate(vectors):
        affine[:world, column] = vector
    affine[:world, 3] = origin
    if len(spatial) == 2:
        notes.append("2-D file, read as one slice")
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    signs = _TO_RAS.get(fields.get("space", "").lower())
    if signs is None and directions:
        notes.append("the header names no anatomical space; left-posterior-superior is taken")
    affine[:3] *= np.array(signs or (-1, -1, 1))[:, None]
    shape = (*(sizes[axis] for axis in spatial), 1)[:3]
    others = [axis for axis in range(len(sizes)) if axis not in spatial]
    return Grid(shape, affine), others[0] if others else None, tuple(notes)


def _numbers(fields: dict[str, str], name: str, path: Path) -> list[float]:
    try:
        values = [float(text) for text in fields[name].split()]
        if values and all(math.isfinite(value) for value in values):
            return values
    except ValueError:
        pass
    raise ImageError(f"the header's '{name}' is '{fields[name][:60]}'.", where=path, fix=_AGAIN)


def _vector(text: str, path: Path) -> list[float]:
    try:
        return [float(part) for part in text.strip("() ").split(",")]
    except ValueError:
        raise ImageError(f"the header has the vector '{text[:60]}'.", where=path, fix=_AGAIN) from None
