"""Slices of a tilted gantry brought onto a grid with right angles, each by a shift within its plane."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NOTHING = 1e-6  # voxels


def straighten(
    array: NDArray[Any], shear: tuple[float, float], shape: tuple[int, ...], *, fill: Any, nearest: bool = False
) -> NDArray[Any]:
    """(C, columns, rows, slices) on the widened grid of `stack.widened`: slice k is moved by k * shear voxels.

    Linear interpolation in float32 (`nearest`: the nearest voxel's value, in the array's own type); `fill` outside.
    """
    dtype = array.dtype if nearest else np.dtype(np.float32)
    result = np.full((array.shape[0], *shape), fill, dtype, order="F")
    last = np.array(shear) * (array.shape[3] - 1)
    first = np.floor(np.minimum(last, 0) + _NOTHING)
    for index in range(array.shape[3]):
        plane = array[..., index].astype(dtype)  # (C, columns, rows)
        for axis in (0, 1):
            start = float(first[axis] - index * shear[axis])
            plane = _moved(plane, start, shape[axis], axis + 1, fill, nearest)
        result[..., index] = plane
    return result


def _moved(plane: NDArray[Any], start: float, size: int, axis: int, fill: Any, nearest: bool) -> NDArray[Any]:
    """`size` values along `axis`, the first of them from the place `start` of the old ones."""
    places = start + np.arange(size)
    if nearest:
        places = np.rint(places)
    below = np.floor(places + _NOTHING).astype(int)
    share = np.clip(places - below, 0, 1).reshape([-1 if a == axis else 1 for a in range(3)])
    last = plane.shape[axis] - 1
    inside = (places >= -_NOTHING) & (places <= last + _NOTHING)
    low = np.take(plane, np.clip(below, 0, last), axis=axis)
    if share.max() > _NOTHING:
        high = np.take(plane, np.clip(below + 1, 0, last), axis=axis)
        low = (low + share * (high - low)).astype(plane.dtype)
    moved: NDArray[Any] = np.where(inside.reshape(share.shape), low, plane.dtype.type(fill))
    return moved
