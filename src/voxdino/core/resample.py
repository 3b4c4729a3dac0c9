"""Resizing arrays, one axis at a time. The outer edges of both grids agree (as `Grid.resized`), not voxel centres."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def resize_linear(array: NDArray[Any], shape: Sequence[int], axes: Sequence[int]) -> NDArray[np.float32]:
    """`array` as float32 with `axes` brought to the sizes `shape`.

    Linear interpolation where an axis grows; where it shrinks, a triangle as wide as two new voxels averages what
    falls into them (anti-aliasing). Beyond the borders the edge is repeated. Equal sizes: the values are unchanged.
    """
    result = array.astype(np.float32)
    # shrinking axes first: less work for the others
    for size, axis in sorted(zip(shape, axes, strict=True), key=lambda pair: pair[0] / array.shape[pair[1]]):
        if size != result.shape[axis]:
            result = _apply(result, linear_matrix(result.shape[axis], size), axis)
    return result


def resize_nearest(array: NDArray[Any], shape: Sequence[int], axes: Sequence[int]) -> NDArray[Any]:
    """`array` with `axes` brought to the sizes `shape`; every value is that of the nearest voxel centre.

    Exact for whole factors: shrinking undoes growing.
    """
    result = array
    for size, axis in zip(shape, axes, strict=True):
        old = result.shape[axis]
        if size != old:
            result = np.take(result, (2 * np.arange(size) + 1) * old // (2 * size), axis=axis)
    return result.copy() if result is array else result


def linear_matrix(old: int, new: int) -> NDArray[np.float32]:
    """(new, old) weights of `resize_linear` along one axis; every row sums to 1."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5  # of the new voxels, in old voxel indices
    width = max(old / new, 1.0)
    first = np.floor(centre - width).astype(int)
    taps = first[:, None] + np.arange(int(np.ceil(2 * width)) + 2)  # (new, taps)
    weights = np.clip(1 - np.abs(taps - centre[:, None]) / width, 0, None)
    if new < old:
        weights[(taps < 0) | (taps >= old)] = 0  # average what there is; growing repeats the edge instead
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), weights)
    return matrix.astype(np.float32)


def _apply(array: NDArray[np.float32], matrix: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    axis %= array.ndim
    if axis == array.ndim - 1:
        return np.asarray(array @ matrix.T)
    rows: NDArray[np.float32] = array.reshape(
        -1, array.shape[axis], int(np.prod(array.shape[axis + 1 :]))
    )  # (before, old, after)
    result: NDArray[np.float32] = np.matmul(matrix, rows)  # (before, new, after)
    resized: NDArray[np.float32] = result.reshape(*array.shape[:axis], len(matrix), *array.shape[axis + 1 :])
    return resized
