"""Overlapping tiles that cover an image, and their blending into one map of logits: NumPy's arrays or torch's."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

Box = tuple[slice, ...]
Seen = tuple[Box, Any, Any]  # rows and columns, values (d, C, h, w) there, and the share (h, w) they have in the blend

OVERLAP = 0.25  # half takes nearly twice the crops (docs/results/overlap.md)


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


def shares(
    boxes: Sequence[Box], weight: Float[Any, "*tile"], total: Float[Any, "*shape"]
) -> Iterator[Float[Any, "*tile"]]:
    """Of each tile in turn, how much of the blend it makes at each of its places: over all tiles they come to 1.

    total: zeros in the shape that the boxes cover; gets the sum of the weights.
    """
    for box in boxes:
        total[box] += weight
    for box in boxes:
        yield weight / total[box]


def blend_slabs(
    slabs: Iterable[tuple[int, Iterable[Seen]]], weight: Sequence[float], held: Float[Any, "d C1 H W"]
) -> Iterator[tuple[int, Float[Any, "C1 H W"]]]:
    """Overlapping slabs in their order, as (first slice, tiles), blended along the slices by `weight`.

    held: zeros for the slices of one slab, which is all that is ever held: every tile is added as it comes, and a slice
    is given out, as (position, values), once no later slab reaches it. Its last channel is the share of the voxel that
    was seen at all: 1 where the tiles of every slab cover it. What is given out is overwritten afterwards.
    """
    depth, begun = len(weight), 0
    totals = [0.0] * depth

    def given_out(positions: range) -> Iterator[tuple[int, Any]]:
        for position in positions:
            place = held[position % depth]
            place /= totals[position % depth]
            yield position, place
            place[:] = 0
            totals[position % depth] = 0.0

    for first, tiles in slabs:
        yield from given_out(range(begun, first))
        begun = first
        for offset in range(depth):
            totals[(first + offset) % depth] += weight[offset]
        for (rows, columns), tile, share in tiles:
            for offset, values in enumerate(tile):
                counts = share * weight[offset]
                place = held[(first + offset) % depth, :, rows, columns]
                place[:-1] += values * counts  # bfloat16 becomes float32 here
                place[-1] += counts
    yield from given_out(range(begun, begun + depth))
