"""NIfTI headers, every number checked before it is believed: sizes, types, offsets, extensions, affines."""

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError, ImageError
from voxdino.core.geometry import Grid, format_shape, format_spacing, require_right_angles
from voxdino.core.io.sniff import name_type
from voxdino.core.io.streams import Source, take, truncated

HEADER_SIZE = {348: Nifti1Header, 540: Nifti2Header}
MAX_EXTENSIONS = 100
MAX_EXTENSION_BYTES = 16 << 20

_TYPES: dict[int, tuple[str, int]] = {  # datatype code -> type of one component, components
    2: ("u1", 1), 4: ("i2", 1), 8: ("i4", 1), 16: ("f4", 1), 64: ("f8", 1), 128: ("u1", 3), 256: ("i1", 1),
    512: ("u2", 1), 768: ("u4", 1), 1024: ("i8", 1), 1280: ("u8", 1), 2304: ("u1", 4),
}  # fmt: skip
_REFUSED_TYPES = {
    0: "no type", 1: "1-bit", 32: "complex64", 1536: "float128", 1792: "complex128", 2048: "complex256",
}  # fmt: skip
_UNIT_MM = {1: 1000.0, 3: 0.001}  # xyzt_units: metres, micrometres


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """A checked header.

    stored_shape: the file's own axes, components excluded.
    frames:       size of the axes after the third.
    slope, inter: value = slope * stored + inter; (1, 0) where the file sets none.
    offset:       bytes before the voxels.
    """

    grid: Grid
    stored_shape: tuple[int, ...]
    frames: int
    dtype: np.dtype[Any]
    components: int
    slope: float
    inter: float
    offset: int
    notes: tuple[str, ...]
    fields: Any  # the nibabel header, for writing like this one


def read_header(source: Source, path: Path) -> NiftiHeader:
    """Read and check the header and its extensions; the source then stands at the first voxel.

    Errors: ImageError, GeometryError.
    """
    head = take(source, 352)
    fields = _parse(head, path)
    if fields.sizeof_hdr == 540:
        head += take(source, 544 - 352)
        fields = _parse(head, path)
    shape = _shape(fields, path)
    dtype, components = _type(fields, path)
    slope, inter = _scaling(fields, path)
    offset = _skip_extensions(source, fields, head, path)
    grid, notes = _grid(fields, shape, path)
    return NiftiHeader(grid, shape, math.prod(shape[3:]), dtype, components, slope, inter, offset, notes, fields)


def _parse(head: bytearray, path: Path) -> Any:
    sizes = {int.from_bytes(head[:4], order): order for order in ("little", "big")} if len(head) >= 4 else {}
    size = next((s for s in sizes if s in HEADER_SIZE), None)
    if size is None:
        fix = "give it the suffix of what it is, or export it as NIfTI."
        raise ImageError(f"is no NIfTI image: it is {name_type(bytes(head))}.", where=path, fix=fix)
    if len(head) < min(size, 352):
        raise truncated(len(head), size, path)
    kind = HEADER_SIZE[size]
    endianness = "<" if sizes[size] == "little" else ">"
    block = bytes(head[:size]).ljust(size, b"\0")  # a NIfTI-2 header comes in two steps
    fields = kind(block, endianness=endianness, check=False)
    magic = bytes(head[344:348]) if size == 348 else bytes(head[4:8])
    if magic[:3] in (b"ni1", b"ni2") or (size == 348 and magic[:2] != b"n+"):
        what = "the header of a NIfTI pair" if magic[:2] == b"ni" else "an Analyze header"
        fix = "convert it to a single .nii.gz file."
        raise ImageError(f"is {what}, which states no single file.", where=path, fix=fix)
    if magic[:3] not in (b"n+1", b"n+2"):
        raise ImageError(f"is no NIfTI image: its magic is {magic!r}.", where=path, fix="export it again.")
    return fields


def _shape(fields: Any, path: Path) -> tuple[int, ...]:
    dim = [int(size) for size in fields["dim"]]
    fix = "the header is damaged or wrong: export the file again."
    if not 2 <= dim[0] <= 7:
        raise ImageError(f"the header declares {dim[0]} dimensions; 2 to 7 are possible.", where=path, fix=fix)
    shape = tuple(dim[1 : dim[0] + 1])
    if min(shape) < 1:
        raise ImageError(f"the header declares {format_shape(shape)} voxels.", where=path, fix=fix)
    return shape


def _type(fields: Any, path: Path) -> tuple[np.dtype[Any], int]:
    code = int(fields["datatype"])
    if code not in _TYPES:
        name = _REFUSED_TYPES.get(code)
        fact = f"voxels of type {name} (code {code})" if name else f"the unknown voxel type code {code}"
        raise ImageError(f"has {fact}.", where=path, fix="export it as integers or float32.")
    kind, components = _TYPES[code]
    return np.dtype(fields.endianness + kind), components


def _scaling(fields: Any, path: Path) -> tuple[float, float]:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # NIfTI: not scaled
    if not math.isfinite(inter):
        raise ImageError(f"the header's scl_inter is {inter}.", where=path, fix="export the file again.")
    return slope, inter


def _skip_extensions(source: Source, fields: Any, head: bytearray, path: Path) -> int:
    """Check the extensions and pass them by: their text (often about patients) is never kept. Returns the offset."""
    start = len(head)
    offset = float(fields["vox_offset"])
    if not math.isfinite(offset) or offset != int(offset) or offset < start - 4:
        fact = f"the header puts the voxels at byte {offset:g}; {start} is the least."
        raise ImageError(fact, where=path, fix="the header is damaged: export the file again.")
    end = max(int(offset), start)
    if end - start > MAX_EXTENSION_BYTES:
        fact = f"the header puts the voxels at byte {end}: {end - start} bytes of extensions are not believed."
        raise ImageError(fact, where=path, fix="remove the extensions, or export the file again.")
    extensions = take(source, end - start)
    if len(extensions) < end - start:
        raise truncated(start + len(extensions), end, path)
    at = count = 0
    order = "little" if fields.endianness == "<" else "big"
    while head[start - 4] and at + 8 <= len(extensions):
        size = int.from_bytes(extensions[at : at + 4], order, signed=True)  # type: ignore[arg-type]
        count += 1
        if size == 0 and not any(extensions[at:]):
            break  # padding
        if size < 16 or size % 16 or at + size > len(extensions):
            fact = f"extension {count} declares {size} bytes; {len(extensions) - at} are there."
            raise ImageError(fact, where=path, fix="remove the extensions, or export the file again.")
        if count > MAX_EXTENSIONS:
            fact = f"has more than {MAX_EXTENSIONS} header extensions."
            raise ImageError(fact, where=path, fix="remove the extensions, or export the file again.")
        at += size
    return end


def _grid(fields: Any, shape: tuple[int, ...], path: Path) -> tuple[Grid, tuple[str, ...]]:
    """The grid in millimetres: the sform's if it is coded, else the qform's, else spacing alone."""
    notes: list[str] = []
    pixdim = [float(size) for size in fields["pixdim"][1:4]]
    for axis in range(min(len(shape), 3)):
        if not math.isfinite(pixdim[axis]) or pixdim[axis] <= 0:
            fact = f"the header's voxel size pixdim[{axis + 1}] is {pixdim[axis]:g}."
            raise GeometryError(fact, where=path, fix="write the true spacing in mm into the header.")
    spatial = (*shape[:3], 1)[:3]
    sform = np.array(fields.get_sform(), dtype=np.float64) if int(fields["sform_code"]) > 0 else None
    qform = _qform(fields, required=sform is None, path=path) if int(fields["qform_code"]) > 0 else None
    affine = sform if sform is not None else qform
    if affine is None:
        affine = np.diag([*(s if i < len(shape) else 1.0 for i, s in enumerate(pixdim)), 1.0])
        notes.append("orientation unknown: neither sform nor qform is set; the axes are taken to run along R, A, S")
    if len(shape) == 2:
        affine = _with_slice_axis(affine)
        notes.append("2-D file, read as one slice")
    if len(shape) > 3 and math.prod(shape[3:]) == 1:
        notes.append(f"{len(shape)}-D file with one frame, read as 3-D")
    factor = _UNIT_MM.get(int(fields["xyzt_units"]) & 7, 1.0)
    if factor != 1.0:
        notes.append(f"lengths converted to mm (x {factor:g})")
    try:
        grid = Grid(spatial, _in_unit(affine, factor))
        require_right_angles(grid)
        if sform is not None and qform is not None:
            notes += _compare(grid, qform, factor)
    except GeometryError as error:
        raise GeometryError(error.fact, where=path, fix=error.fix) from None
    if sform is not None:
        sizes = [size * factor for size in pixdim[: len(shape)]]
        if not np.allclose(sizes, grid.spacing[: len(sizes)], rtol=0.01):
            notes.append(
                f"the header's voxel sizes {format_spacing(sizes)} differ from its affine's "
                f"{format_spacing(grid.spacing[: len(sizes)])}; the affine's are used"
            )
    return grid, tuple(notes)


def _qform(fields: Any, *, required: bool, path: str | PathLike[str]) -> NDArray[np.float64] | None:
    """The qform as an affine; None where it is unusable and not required."""
    copy = fields.copy()
    if copy["pixdim"][0] not in (-1, 1):
        copy["pixdim"][0] = 1
    for axis in (1, 2, 3):
        if not copy["pixdim"][axis] > 0:
            copy["pixdim"][axis] = 1
    try:
        affine = np.array(copy.get_qform(), dtype=np.float64)
        if np.isfinite(affine).all():
            return affine
        reason = "it holds NaN or infinity"
    except (ValueError, ArithmeticError) as error:
        reason = str(error)
    if required:
        raise GeometryError(f"the qform is unusable: {reason}.", where=path, fix="repair the header.")
    return None


def _with_slice_axis(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The affine of a 2-D file with a third axis across the other two, 1 mm long where it has none."""
    result = affine.copy()
    if not np.any(result[:3, 2]):
        normal = np.cross(result[:3, 0], result[:3, 1])
        length = float(np.linalg.norm(normal))
        result[:3, 2] = normal / length if length > 0 else 0.0
    return result


def _in_unit(affine: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    result = affine.copy()
    result[:3] *= factor
    result[3] = (0, 0, 0, 1)
    return result


def _compare(grid: Grid, qform: NDArray[np.float64], factor: float) -> list[str]:
    """A note where the qform puts voxels elsewhere than the sform by more than a tenth of a voxel."""
    try:
        other = Grid(grid.shape, _in_unit(qform, factor))
    except GeometryError:
        return ["the qform is unusable; the sform is used"]
    offset = grid.largest_offset(other)
    if offset <= 0.1 * min(grid.spacing):
        return []
    return [f"sform and qform disagree by up to {offset:.3g} mm; the sform is used"]
