"""The parts of a case that a model looks at, whatever computes it: which slices together, what is cut and padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from voxdino.core.labels import LabelSet
from voxdino.data.store import padding_values
from voxdino.inference.gate import Ends, Gate, at_least
from voxdino.inference.tiles import Box, gaussian_weight, slab_starts
from voxdino.preparation.intensity import ChannelScaling, normalise
from voxdino.preparation.plan import Plan
from voxdino.preparation.slices import CaseSlices

LOGIT_BYTES = 64 << 20  # of logits held at once: two slices of 25 classes, or one of many
PART = 8  # most slices in a part: smaller ones fit their body more tightly
WHOLE = 1.5  # times the slab of training: so long a volume is predicted whole

_BACKGROUND = 20.0  # logit of what is certain without looking


@dataclass(frozen=True, eq=False)
class Part:
    """Slices first to last (context beside them) of rows and columns, in file values; raw None: nothing to see."""

    first: int
    last: int
    rows: Ends
    columns: Ends
    raw: Shaped[np.ndarray, "C n h w"] | None


def slice_ranges(plan: Plan, depth: int, *, overlap: float, slice_bytes: int, logit_bytes: int) -> list[Ends]:
    """The slices that are seen together: overlapping slabs where the model sees slabs, else a few side by side."""
    if plan.slab > 1:
        slab = predicted_slab(plan.slab, depth)
        return [(start, start + slab) for start in slab_starts(depth, slab, overlap=overlap)]
    step = max(1, min(PART, logit_bytes // slice_bytes))
    return [(first, min(first + step, depth)) for first in range(0, depth, step)]


def predicted_slab(slab: int, num_slices: int) -> int:
    """Slices of a volume that are predicted together: all where they are not many more than in training."""
    return num_slices if num_slices <= WHOLE * slab else slab


def slab_weight(ranges: Sequence[Ends]) -> list[float]:
    """Of the slices of a slab, where slabs overlap; a single one counts as it is."""
    depth = ranges[0][1] - ranges[0][0]
    return gaussian_weight((depth,)).tolist() if len(ranges) > 1 else [1.0] * depth


def read_part(slices: CaseSlices, plan: Plan, gate: Gate, first: int, last: int) -> Part:
    """Slices first to last with their context, cut to what the gate shows, a tile at least.

    Context slices are the real neighbours; the first and last slice of the volume are repeated beyond its ends.
    """
    context, depth = plan.context_slices, slices.shape[1]
    wanted = np.clip(np.arange(first - context, last + context), 0, depth - 1)
    raw = slices.read(wanted.tolist())
    found = gate.region(raw[:, context : raw.shape[1] - context], first)
    if found is None:
        return Part(first, last, (0, 0), (0, 0), None)
    rows, columns = (at_least(*one) for one in zip(found, plan.tile, slices.shape[2:], strict=True))
    cut = np.ascontiguousarray(raw[:, :, slice(*rows), slice(*columns)])
    return Part(first, last, rows, columns, cut)


def padded(shape: Sequence[int], tile: Sequence[int]) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """The size that holds a tile, and where in its middle the image lies, as crops are padded in training."""
    size = tuple(max(length, least) for length, least in zip(shape, tile, strict=True))
    starts = [(new - old) // 2 for new, old in zip(size, shape, strict=True)]
    return size, tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))


def in_plane(part: Part, places: Sequence[slice], box: Box) -> tuple[Box, Box]:
    """What a tile of a padded part shows of the image: where that lies in the slice, and where in the tile."""
    slice_box, tile_box = [], []
    for ends, place, tile in zip((part.rows, part.columns), places, box, strict=True):
        start, stop = max(tile.start, place.start), min(tile.stop, place.stop)
        moved = ends[0] - place.start
        slice_box.append(slice(start + moved, stop + moved))
        tile_box.append(slice(start - tile.start, stop - tile.start))
    return tuple(slice_box), tuple(tile_box)


def normalised_slab(
    raw: Shaped[np.ndarray, "Csrc n h w"], scaling: Sequence[ChannelScaling], tile: Sequence[int]
) -> tuple[Float[np.ndarray, "C n H W"], tuple[slice, ...]]:
    """A part as the network sees it, a tile at least, and where in it the part lies."""
    size, places = padded(raw.shape[2:], tile)
    slab = np.empty((len(scaling), raw.shape[1], *size), dtype=np.float32)
    slab[:] = padding_values(scaling)[:, None, None, None]
    slab[:, :, places[0], places[1]] = normalise(raw, scaling)
    return slab, places


def slice_bytes(plan: Plan, shape: Sequence[int]) -> int:
    """Bytes of the logits of one slice."""
    return 4 * plan.labels.num_outputs * int(np.prod(padded(shape, plan.tile)[0]))


def background_logits(labels: LabelSet) -> Float[np.ndarray, " K"]:
    """What is said of voxels that nobody looks at."""
    if labels.regions:
        return np.full(labels.num_outputs, -_BACKGROUND, dtype=np.float32)
    logits: Any = np.zeros(labels.num_outputs, dtype=np.float32)
    logits[0] = _BACKGROUND
    return np.asarray(logits)
