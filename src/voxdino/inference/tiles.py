"""Overlapping tiles that cover an image, and their blending into one map of logits: NumPy's arrays or torch's."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

Box = tuple[slice, ...]

OVERLAP = 0.25  # half takes nearly twice the time and won nothing measurable (docs/results/overlap.md)


def tile_boxes(shape: Sequence[int], tile: Sequence[int], overlap: float = OVERLAP) -> list[Box]:
    """Boxes of size `tile` that cover `shape`, evenly spread, neighbours sharing at least `overlap` of their length.

    shape must be at least tile along every axis (pad before); overlap lies in [0, 1).
    """
    assert 0 <= overlap < 1, f"overlap {overlap}"
    starts = []
    for size, length in zip(shape, tile, strict=True):
        assert size >= length, f"a tile of {tuple(tile)} does not fit into {tuple(shape)}"
        step = max(1, int(length * (1 - overlap)))
        num = ceil((size - length) / step) + 1
        starts.append([round(i * (size - length) / max(num - 1, 1)) for i in range(num)])
    return [tuple(slice(a, a + b) for a, b in zip(corner, tile, strict=True)) for corner in product(*starts)]


def slab_starts(num_slices: int, slab: int, *, overlap: float) -> list[int]:
    """First slices of the slabs that cover a volume, evenly spread; one for a volume that is shorter."""
    if num_slices <= slab:
        return [0]
    return [box[0].start for box in tile_boxes((num_slices,), (slab,), overlap)]


def gaussian_weight(tile: Sequence[int], *, sigma: float = 0.125) -> Float[np.ndarray, "*tile"]:
    """Weights for blending: a Gaussian of `sigma` tile lengths, 1 in the middle, nowhere below 1e-3."""
    weight = np.ones((), dtype=np.float32)
    for length in tile:
        offset = (np.arange(length, dtype=np.float32) - (length - 1) / 2) / (sigma * length)
        weight = weight[..., None] * np.exp(-0.5 * offset**2)
    return np.asarray((weight / weight.max()).clip(1e-3), dtype=np.float32)


def blend(
    tiles: Iterable[tuple[Box, Float[Any, "*channels_and_tile"]]],
    weight: Float[Any, "*tile"],
    out: Float[Any, "*channels_and_shape"],
) -> Float[Any, "*channels_and_shape"]:
    """Weighted mean of overlapping tiles in float32, written into `out` (float32 zeros) and returned.

    The last axes of the tiles and of `out` are those of the boxes; the boxes must cover `out`. Arrays of NumPy or
    tensors, all of one device.
    """
    total = out[(0,) * (out.ndim - weight.ndim)] * 0
    for box, tile in tiles:
        part = out[(Ellipsis, *box)]
        part += tile * weight  # bfloat16 becomes float32 here
        total[box] += weight
    out /= total
    return out


def blend_slabs(slabs: Iterable[tuple[int, Any]], weight: Sequence[float]) -> Iterator[tuple[int, Any]]:
    """Overlapping slabs in their order, as (first slice, (d, K, H, W)), blended along d by `weight`.

    Comes out slice by slice, as (position, (1, K, H, W)), each once no later slab reaches it.
    """
    held: dict[int, tuple[Any, float]] = {}  # slice -> weighted sum, and the sum of the weights
    for first, slab in slabs:
        yield from _given_out(held, [position for position in held if position < first])
        for offset, logits in enumerate(slab):
            total, weights = held.get(first + offset, (logits * 0, 0.0))
            total += logits * weight[offset]
            held[first + offset] = total, weights + weight[offset]
    yield from _given_out(held, list(held))


def _given_out(held: dict[int, tuple[Any, float]], positions: list[int]) -> Iterator[tuple[int, Any]]:
    for position in positions:
        total, weights = held.pop(position)
        total /= weights
        yield position, total[None]
