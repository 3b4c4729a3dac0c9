"""Overlapping tiles that cover an image, and their blending into one map of logits."""

from collections.abc import Iterable, Sequence
from itertools import product
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

Box = tuple[slice, ...]


def tile_boxes(shape: Sequence[int], tile: Sequence[int], overlap: float = 0.5) -> list[Box]:
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


def gaussian_weight(tile: Sequence[int], *, sigma: float = 0.125) -> Float[Tensor, "*tile"]:
    """Weights for blending: a Gaussian of `sigma` tile lengths, 1 in the middle, nowhere below 1e-3."""
    weight = torch.ones(())
    for length in tile:
        offset = (torch.arange(length, dtype=torch.float32) - (length - 1) / 2) / (sigma * length)
        weight = weight[..., None] * torch.exp(-0.5 * offset**2)
    return (weight / weight.max()).clamp_min(1e-3)


def blend(
    tiles: Iterable[tuple[Box, Float[Tensor, "*channels_and_tile"]]],
    weight: Float[Tensor, "*tile"],
    out: Float[Tensor, "*channels_and_shape"],
) -> Float[Tensor, "*channels_and_shape"]:
    """Weighted mean of overlapping tiles in float32, written into `out` (zeros) and returned.

    The last axes of the tiles and of `out` are those of the boxes; the boxes must cover `out`.
    """
    total = torch.zeros(out.shape[out.ndim - weight.ndim :], dtype=torch.float32, device=out.device)
    weight = weight.to(out.device)
    for box, tile in tiles:
        out[(Ellipsis, *box)].addcmul_(tile.float(), weight)  # type: ignore[index]
        total[box] += weight
    return out.div_(total)
