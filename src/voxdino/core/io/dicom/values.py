"""From stored values to the image's: rescaled slice by slice, right side up in brightness, without padding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.io.dicom.headers import Instance
from voxdino.core.io.dicom.stack import Stack

_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Scale:
    """How the stored values of a stack become those of its image.

    dtype:  of the values while frames are collected.
    slopes, intercepts: per slice; applied as slope * stored + intercept where `dtype` is a float.
    shift:  what whole numbers are moved by at the end: a slope of 1 and one whole intercept, as CT has them.
    ends:   smallest and largest value that the bits can hold, None for colours and floats.
    """

    dtype: np.dtype[Any]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    shift: int
    ends: tuple[float, float] | None

    @classmethod
    def of(cls, stack: Stack) -> "Scale":
        first, num = stack.instances[0], len(stack.indices)
        slopes, intercepts = zip(*((plane.slope, plane.intercept) for plane in stack.planes), strict=True)
        ones, zeros = (1.0,) * num, (0.0,) * num
        if first.samples == 3 or first.photometric == "PALETTE COLOR":
            return cls(np.dtype(np.uint8 if first.bits_allocated == 8 else np.uint16), ones, zeros, 0, None)
        ends = [_stored_ends(file) for file in stack.instances]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        is_whole = set(slopes) == {1.0} and len(set(intercepts)) == 1 and intercepts[0] == int(intercepts[0])
        if is_whole and not any(file.has_table or file.is_float for file in stack.instances):
            kind = "i" if low < 0 else "u"
            size = max(file.bits_allocated for file in stack.instances) // 8 or 1
            return cls(np.dtype(f"{kind}{size}"), ones, zeros, int(intercepts[0]), (float(low), float(high)))
        if first.has_table or first.is_float:
            return cls(np.dtype(np.float64 if first.bits_allocated == 64 else np.float32), slopes, intercepts, 0, None)
        both = [a * end + b for a, b in zip(slopes, intercepts, strict=True) for end in (low, high)]
        return cls(np.dtype(np.float32), slopes, intercepts, 0, (min(both), max(both)))


def _stored_ends(instance: Instance) -> tuple[int, int]:
    bits = instance.bits_stored
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if instance.is_signed else (0, (1 << bits) - 1)


def rescaled(stored: NDArray[Any], slope: float, intercept: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """slope * stored + intercept in `dtype`, computed in float64."""
    if (slope, intercept) == (1.0, 0.0):
        return stored.astype(dtype)
    return (stored * np.float64(slope) + intercept).astype(dtype)


def shifted(array: NDArray[Any], shift: int) -> NDArray[Any]:
    """Whole numbers plus `shift`: in place in 16 bits where all fit, else in 32."""
    if shift == 0:
        return array
    low, high = int(array.min()) + shift, int(array.max()) + shift
    if array.dtype.itemsize == 2 and low >= _INT16.min and high <= _INT16.max:
        result = array.view(np.int16)  # arithmetic modulo 2^16 brings large unsigned values back
        result += np.int16(shift)
        return result
    return array.astype(np.int16 if array.dtype.itemsize == 1 else np.int32) + shift


def without_padding(array: NDArray[Any], stack: Stack, scale: Scale) -> tuple[NDArray[Any], tuple[str, ...]]:
    """(slices, rows, columns, 1): what stands for "outside of what was measured" becomes the smallest measured value.

    As air is in CT. (The largest, where the image is yet to be inverted.)
    """
    extreme = max if stack.instances[0].is_inverted else min
    found, num = [], 0
    for mask, values in _with_masks(array, stack, scale):
        measured = values[~mask]
        num += values.size - measured.size
        if measured.size:
            found.append(extreme(measured.min(), measured.max()))
    if not found or not num:
        return array, ()
    for mask, values in _with_masks(array, stack, scale):
        values[mask] = extreme(found)
    return array, (f"padding in {num} voxels reads as the smallest value, {extreme(found) + scale.shift:g}",)


def _with_masks(array: NDArray[Any], stack: Stack, scale: Scale) -> Iterator[tuple[NDArray[np.bool_], NDArray[Any]]]:
    """Every slice, and where it holds padding."""
    for values, file, slope, intercept in zip(array, stack.instances, scale.slopes, scale.intercepts, strict=True):
        if file.padding is None or file.has_table or values.shape[-1] > 1:
            yield np.zeros(values.shape, bool), values
            continue
        ends = np.array(file.padding)
        if array.dtype.kind == "f":
            ends = rescaled(ends, slope, intercept, array.dtype)
        yield (values >= ends.min()) & (values <= ends.max()), values
