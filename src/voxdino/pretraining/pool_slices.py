"""The slices of a case: along which axes it is cut, what is measured of each, and which of them are kept.

Measurements are facts and stay with the case; what is kept is decided from them, so that other thresholds cost nothing.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field

from voxdino.core.records import Record
from voxdino.core.resample import linear_matrix
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.orientation import DISPLAY_AXES, SliceAxis
from voxdino.pretraining.pool_sources import NEARLY_ISOTROPIC

AXES: tuple[SliceAxis | None, ...] = (None, "S", "A", "R")  # number in the index -> axis; None: a picture
THUMBNAIL = 32  # pixels of a side
SLICE_FACTS = np.dtype(
    [("axis", "u1"), ("slice", "<i4"), ("foreground", "<f4"), ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL))]
)

_NOTHING = 0.05  # of the case's intensity range: air, the black around a patient
_SMALLEST_SIDE = 16  # voxels; planes across a volume are no pictures below
_BLOCK_VALUES = 1 << 23  # measured together


class PoolConfig(Record):
    """Which slices are made of the images, and which of those are kept.

    axes:             "plan": along the axis that a plan would choose; "all": nearly isotropic volumes along all three.
    in_plane_spacing: mm that the pixels of all slices get; None, or no spacing in the file: they stay as they are.
    min_foreground:   least share of a slice that is not air or black border. A slice without any is never kept.
    max_similarity:   a slice is dropped whose 32 x 32 thumbnail correlates more than this with the last slice kept
                      before it; None: all are kept. 0.995 keeps one slice in about 6 mm of a trunk CT.
    """

    axes: Literal["plan", "all"] = "plan"
    in_plane_spacing: float | None = Field(default=None, gt=0)
    min_foreground: float = Field(default=0.05, ge=0, le=1)
    max_similarity: float | None = Field(default=0.995, gt=0, le=1)


def axes_to_cut(
    axis: SliceAxis | None, spacing: tuple[float, ...], shape: tuple[int, int, int], config: PoolConfig
) -> tuple[SliceAxis | None, ...]:
    """The axes that a case (D, H, W) is cut along. spacing: of the file, before anything was resampled."""
    is_cubic = axis is not None and max(spacing) <= NEARLY_ISOTROPIC * min(spacing) and min(shape) >= _SMALLEST_SIDE
    if config.axes == "plan" or axis is None or not is_cubic:
        return (axis,)
    return (axis, *(other for other in AXES if other is not None and other != axis))


def turn_slices(
    stacked: SliceAxis | None, axis: SliceAxis | None
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """(order, flips) that bring (D, H, W) with slices along `stacked` to slices along `axis`, as a reader sees them.

    As `orientation.slice_geometry` would lay them: S runs up from slice to slice, and down within a slice.
    """
    if stacked is None or axis is None or stacked == axis:
        return (0, 1, 2), (False, False, False)
    held, wanted = DISPLAY_AXES[stacked], DISPLAY_AXES[axis]
    depth, rows, columns = (held.index(world) for world in wanted)
    turns = (stacked == "S") != (axis == "S")
    return (depth, rows, columns), (turns and wanted[0] == "S", turns and wanted[1] == "S", False)


def measure_slices(
    image: NDArray[Any],
    scaling: tuple[ChannelScaling, ...],
    stacked: SliceAxis | None,
    axes: tuple[SliceAxis | None, ...],
) -> NDArray[Any]:
    """SLICE_FACTS of every slice of a case (C, D, H, W) along each of `axes`: share of foreground, thumbnail."""
    parts = []
    for axis in axes:
        order, flips = turn_slices(stacked, axis)
        turned = image.transpose(0, *(1 + place for place in order))
        turned = np.flip(turned, tuple(1 + place for place, flip in enumerate(flips) if flip))
        facts = np.zeros(turned.shape[1], dtype=SLICE_FACTS)
        facts["axis"], facts["slice"] = AXES.index(axis), np.arange(len(facts))
        step = max(1, _BLOCK_VALUES // max(1, turned[:, 0].size))
        for start in range(0, len(facts), step):
            block = facts[start : start + step]
            block["foreground"], small = _look_at(turned[:, start : start + step], scaling)
            block["thumbnail"] = np.rint(255 * small.clip(0, 1)).astype(np.uint8)
        parts.append(facts)
    return np.concatenate(parts)


def _look_at(
    slices: NDArray[Any], scaling: tuple[ChannelScaling, ...]
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d h w"]]:
    """Share of foreground and thumbnail, values 0 to 1, of slices (C, d, H, W).

    In strips of rows: a huge picture is never there a second time, as floating-point numbers.
    """
    _, depth, rows, columns = slices.shape
    over_rows, over_columns = linear_matrix(rows, THUMBNAIL), linear_matrix(columns, THUMBNAIL)
    num_full = np.zeros(depth, dtype=np.int64)
    small = np.zeros((depth, THUMBNAIL, THUMBNAIL), dtype=np.float32)
    step = max(1, _BLOCK_VALUES // max(1, slices[:, :, 0].size))
    for first in range(0, rows, step):
        shown = _in_range(slices[:, :, first : first + step], scaling)  # (C, d, rows, W)
        num_full += (shown > _NOTHING).any(axis=0).sum(axis=(1, 2))
        small += over_rows[:, first : first + step] @ (shown.mean(axis=0) @ over_columns.T)
    return num_full / (rows * columns), small


def _in_range(image: NDArray[Any], scaling: tuple[ChannelScaling, ...]) -> NDArray[np.float32]:
    """(C, ...) file values as 0 to 1 of each channel's range; a constant channel is 0."""
    shown = np.empty((len(scaling), *image.shape[1:]), dtype=np.float32)
    for channel, rule in zip(shown, scaling, strict=True):
        np.clip(image[rule.source].astype(np.float32), rule.lower, rule.upper, out=channel)
        channel -= np.float32(rule.lower)
        channel /= np.float32(rule.upper - rule.lower) or np.float32(1)
    return shown


def choose_slices(facts: NDArray[Any], config: PoolConfig) -> Int[np.ndarray, "n 2"]:
    """(n, 2) int32 of the SLICE_FACTS that are kept: number of the axis, place along it."""
    kept = []
    is_full = (facts["foreground"] > 0) & (facts["foreground"] >= config.min_foreground)
    for axis in sorted(set(facts["axis"].tolist())):
        rows = np.flatnonzero(is_full & (facts["axis"] == axis))
        patterns = _patterns(facts["thumbnail"][rows])
        last = None
        for row, pattern in zip(rows.tolist(), patterns, strict=True):
            if last is None or config.max_similarity is None or float(pattern @ last) <= config.max_similarity:
                kept.append((axis, int(facts["slice"][row])))
                last = pattern
    return np.array(kept, dtype=np.int32).reshape(-1, 2)


def _patterns(thumbnails: NDArray[Any]) -> Float[np.ndarray, "n E"]:
    """Vectors whose products are the correlations of thumbnails (n, h, w); two constant ones correlate fully."""
    flat = thumbnails.reshape(-1, THUMBNAIL * THUMBNAIL).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    is_constant = lengths == 0
    return np.hstack([flat / np.where(is_constant, 1, lengths), is_constant]).astype(np.float32)
