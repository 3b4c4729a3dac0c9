"""What may stand in a voxel: finite numbers in images, whole numbers in label maps."""

from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import ImageError, LabelError
from voxdino.core.io.options import NanPolicy

ROUNDING = 1e-3  # a label value this near a whole number is one
_EXACT_FLOAT32 = 1 << 24


def require_finite(
    array: NDArray[Any], policy: NanPolicy, where: str | PathLike[str] | None
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The array without NaN and infinity, and a note where some were replaced (policy "fill").

    NaN and -infinity become the smallest finite value (what lies outside the field of view: air in CT, 0 in MR),
    +infinity the largest. Errors: ImageError with the counts; also where no value at all is finite.
    """
    if array.dtype.kind != "f":
        return array, ()
    with np.errstate(invalid="ignore"):
        if np.isfinite(array.min()) and np.isfinite(array.max()):
            return array, ()
    num_nan = num_plus = num_minus = 0
    low, high = np.inf, -np.inf
    for index in range(array.shape[-1]):  # slice by slice: no mask as large as the whole
        block = array[..., index]
        num_nan += int(np.isnan(block).sum())
        num_plus += int(np.isposinf(block).sum())
        num_minus += int(np.isneginf(block).sum())
        finite = block[np.isfinite(block)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    counts = [
        f"{count} {name}"
        for count, name in ((num_nan, "NaN"), (num_plus, "+infinity"), (num_minus, "-infinity"))
        if count
    ]
    fact = f"holds {', '.join(counts)} among {array.size} voxels"
    if low > high:
        raise ImageError(f"{fact}: no value is finite.", where=where, fix="export the image again.")
    if policy == "refuse":
        fix = "repair the image, or fill them with --nan-policy fill."
        raise ImageError(f"{fact}.", where=where, fix=fix)
    filled = np.nan_to_num(array, copy=not array.flags.writeable, nan=low, posinf=high, neginf=low)
    return filled, (f"{fact}; filled with {low:g}" + (f" and {high:g}" if num_plus else ""),)


def note_inexact(array: NDArray[Any]) -> tuple[str, ...]:
    """A note where integers are too large for the float32 in which images are computed."""
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 4 or array.size == 0:
        return ()
    largest = max(int(array.max()), -int(array.min()))
    if largest <= _EXACT_FLOAT32:
        return ()
    return (f"values up to {largest} lose their last digits in float32",)


def to_whole_numbers(array: NDArray[Any], where: str | PathLike[str] | None) -> NDArray[np.integer[Any]]:
    """Label values as integers: integers as they are, floats rounded where within 1e-3 of a whole number.

    Errors: LabelError naming the values that are not, or that are NaN, or beyond 64 bits.
    """
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    if array.dtype.kind in "iu":
        return array
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise LabelError(f"holds NaN or infinity in {count} voxels.", where=where, fix="export the labels again.")
    if high >= 2**53 or low <= -(2**53):
        raise LabelError(f"holds {max(high, -low):g}, no label.", where=where, fix="export the labels as integers.")
    dtype = np.result_type(np.min_scalar_type(round(low)), np.min_scalar_type(round(high)))
    result = np.empty_like(array, dtype=dtype)
    for index in range(array.shape[-1]):  # slice by slice: no second float copy of the whole
        plane = array[..., index]
        rounded = np.rint(plane)
        wrong = np.abs(plane - rounded) > ROUNDING
        if wrong.any():
            values = ", ".join(f"{value:g}" for value in np.unique(plane[wrong])[:5])
            fact = f"holds label values that are no whole numbers: {values} ..."
            raise LabelError(fact, where=where, fix="resample labels with nearest neighbour, and save integers.")
        result[..., index] = rounded
    return result
