"""Which patches of the global crops are hidden from the student: block masks (iBOT, arXiv 2111.07832; dossier 5.7)."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

_SMALLEST_BLOCK = 4  # patches
_ASPECTS = (0.3, 3.3)  # rows / columns of a block
_NUM_BLOCKS = 12  # tries per image; what is then missing to its count is completed at random


def draw_masks(
    num_images: int,
    grid: tuple[int, int],
    *,
    share_masked: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
    rng: np.random.Generator,
) -> Bool[Tensor, "B N"]:
    """True where a patch is masked, N = rows * columns of the token grid, row by row; on the CPU.

    share_masked: of the images, rounded up, that have a mask; which ones is drawn too.
    ratios:       of an image's patches. They are spread evenly: with n masked images, one is drawn from each of n equal
                  parts of the range, and an image has exactly the rounded number of masked patches.
    """
    num_masked = min(num_images, math.ceil(round(num_images * share_masked, 6)))
    low, high = ratios
    places = (np.arange(num_masked) + rng.random(num_masked)) / max(num_masked, 1)  # in (0, 1), evenly
    counts = np.rint((low + (high - low) * places) * math.prod(grid)).astype(np.int64)
    masks = np.zeros((num_images, math.prod(grid)), dtype=bool)
    masks[rng.permutation(num_images)[:num_masked]] = _complete(draw_blocks(counts, grid, rng), counts, rng)
    return torch.from_numpy(masks)


def draw_blocks(
    counts: Int[np.ndarray, "n"], grid: tuple[int, int], rng: np.random.Generator
) -> Bool[np.ndarray, "n rows columns"]:
    """Rectangles laid over each other until an image has nearly `counts` masked patches, and never more.

    A block has 4 patches or more and at most those still missing, and rows / columns between 0.3 and 3.3; it is laid
    only where it hides something new. All images are drawn side by side.
    """
    rows, columns = np.arange(grid[0])[None, :, None], np.arange(grid[1])[None, None, :]
    masks = np.zeros((len(counts), *grid), dtype=bool)
    for area_draw, aspect_draw, top_draw, left_draw in rng.random((_NUM_BLOCKS, 4, len(counts))):
        missing = counts - masks.sum(axis=(1, 2))
        area = _SMALLEST_BLOCK + area_draw * np.maximum(missing - _SMALLEST_BLOCK, 0)
        aspect = _ASPECTS[0] * (_ASPECTS[1] / _ASPECTS[0]) ** aspect_draw
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        top, left = _first(top_draw, grid[0], height), _first(left_draw, grid[1], width)
        blocks = _between(rows, top, height) & _between(columns, left, width)
        num_new = (blocks & ~masks).sum(axis=(1, 2))
        fits = (height <= grid[0]) & (width <= grid[1]) & (height * width >= _SMALLEST_BLOCK)
        fits &= (_ASPECTS[0] * width <= height) & (height <= _ASPECTS[1] * width)
        fits &= (missing >= _SMALLEST_BLOCK) & (num_new > 0) & (num_new <= missing)
        masks |= blocks & fits[:, None, None]
    return masks


def _first(draw: NDArray[np.float64], length: int, size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a block of `size` starts on an axis, evenly over all places."""
    return np.floor(draw * np.maximum(length - size + 1, 1))


def _between(places: NDArray[np.int64], first: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.bool_]:
    start = first[:, None, None]
    return (places >= start) & (places < start + size[:, None, None])


def _complete(
    blocks: Bool[np.ndarray, "n rows columns"], counts: Int[np.ndarray, "n"], rng: np.random.Generator
) -> Bool[np.ndarray, "n N"]:
    """Single patches, drawn at random, up to the exact counts."""
    masks = blocks.reshape(len(blocks), math.prod(blocks.shape[1:]))
    for mask, count in zip(masks, counts, strict=True):
        if missing := int(count - mask.sum()):
            mask[rng.choice(np.flatnonzero(~mask), missing, replace=False)] = True
    return masks
