"""Images that a program holds in memory already: arrays and those of nibabel, SimpleITK and MONAI, made volumes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import ImageError, UsageError
from voxdino.core.geometry import Grid, format_shape
from voxdino.core.volume import Volume

_WHERE = "image"
_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}


def to_volume(
    image: Any, *, ndim: int, spacing: Sequence[float | int] | None = None, affine: NDArray[Any] | None = None
) -> Volume:
    """An image in memory as (C, *spatial) with its grid; its values are not copied where they need not be.

    image: one of
    - a `Volume`;
    - a nibabel image, its frames taken as channels;
    - a SimpleITK image, its components taken as channels;
    - a MetaTensor of MONAI, (C, *spatial): whatever has `array` and `affine`;
    - an array (or a tensor on the CPU), (*spatial) or (C, *spatial), with `spacing` (one length per axis; the axes then
      run to the right, the front and the head) or `affine` ((4, 4), index -> RAS+ mm, as nibabel has it).
    ndim:  3 for volumes; 2 for pictures (rows, columns), whose grid is pixels where no spacing is given.
    Errors: ImageError, GeometryError; UsageError for spacing or affine where the image has its own, or none at all.
    """
    if isinstance(image, Volume):
        return _with_own_grid(image, spacing, affine)
    if hasattr(image, "dataobj"):
        return _with_own_grid(_of_nibabel(image), spacing, affine)
    if hasattr(image, "GetDirection"):
        return _with_own_grid(_of_simple_itk(image), spacing, affine)
    if hasattr(image, "array") and hasattr(image, "affine"):
        return _with_own_grid(_of_meta_tensor(image, ndim), spacing, affine)
    array = _with_channels(_numbers(image), ndim)
    return Volume(array, _stated_grid(array.shape[1:], spacing, affine))


def _with_own_grid(volume: Volume, spacing: Sequence[float | int] | None, affine: NDArray[Any] | None) -> Volume:
    if spacing is not None or affine is not None:
        fix = "leave spacing and affine out, or give the array alone."
        raise UsageError("the image says itself where it lies.", where=_WHERE, fix=fix)
    return volume


def _stated_grid(shape: tuple[int, ...], spacing: Sequence[float | int] | None, affine: NDArray[Any] | None) -> Grid:
    if spacing is not None and affine is not None:
        raise UsageError("both spacing and affine are given.", where=_WHERE, fix="give one of them.")
    if affine is not None:
        return Grid(shape, np.asarray(affine, dtype=np.float64))
    if spacing is None and len(shape) == 3:
        fix = "give spacing=(a, b, c) in mm, one per axis of the array, or affine."
        raise UsageError("an array does not say how large its voxels are.", where=_WHERE, fix=fix)
    if spacing is not None and (len(spacing) != len(shape) or min(spacing) <= 0):
        fact = f"spacing is {tuple(spacing)} for {len(shape)} axes."
        raise UsageError(fact, where=_WHERE, fix="give one positive length per axis.")
    lengths = None if spacing is None else [float(length) for length in spacing]
    return Grid.from_spacing(shape, lengths, "px" if spacing is None else "mm")


def _of_nibabel(image: Any) -> Volume:
    array = np.asanyarray(image.dataobj)  # scaled as the header says
    array = np.moveaxis(array.reshape(*array.shape[:3], -1), -1, 0)
    unit = _MM.get(image.header.get_xyzt_units()[0], 1.0) if hasattr(image.header, "get_xyzt_units") else 1.0
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= unit
    return Volume(_real(array), Grid(array.shape[1:], affine))


def _of_simple_itk(image: Any) -> Volume:
    import SimpleITK

    ndim = image.GetDimension()
    array = SimpleITK.GetArrayFromImage(image)  # (z, y, x), components behind
    if image.GetNumberOfComponentsPerPixel() == 1:
        array = array[..., None]
    array = np.moveaxis(array, -1, 0)
    spacing = np.array(image.GetSpacing())
    if ndim == 2:  # (rows, columns)
        return Volume(_real(array), Grid.from_spacing(array.shape[1:], [float(length) for length in spacing[::-1]]))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * spacing
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # LPS -> RAS
    array = array.transpose(0, 3, 2, 1)
    return Volume(_real(array), Grid(array.shape[1:], affine))


def _of_meta_tensor(image: Any, ndim: int) -> Volume:
    array = _with_channels(_numbers(image.array), ndim)
    affine = np.asarray(image.affine).astype(np.float64)
    if ndim == 2:
        return Volume(array, Grid.from_spacing(array.shape[1:], [float(n) for n in np.linalg.norm(affine, axis=0)[:2]]))
    if str(dict(getattr(image, "meta", {})).get("space", "RAS")).upper() == "LPS":
        affine[:2] *= -1
    return Volume(array, Grid(array.shape[1:], affine))


def _with_channels(array: NDArray[Any], ndim: int) -> NDArray[Any]:
    """(C, *spatial) of (*spatial) or of itself."""
    if array.ndim == ndim:
        return array[None]
    if array.ndim != ndim + 1:
        fact = f"an array of {format_shape(array.shape)} for a model of {ndim}-D images."
        raise ImageError(fact, where=_WHERE, fix=f"give {ndim} axes, or channels and {ndim} axes.")
    return array


def _numbers(image: Any) -> NDArray[Any]:
    return _real(np.asarray(image))


def _real(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "buif":
        raise ImageError(f"holds {array.dtype} values.", where=_WHERE, fix="give an array of real numbers.")
    return array.astype(np.float32) if array.dtype == np.float16 else array
