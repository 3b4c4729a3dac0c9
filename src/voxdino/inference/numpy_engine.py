"""The engine without torch: the same parts, tiles and labels as `predictor`, in NumPy, around any network of tiles."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from voxdino.core.labels import LabelSet
from voxdino.core.resample import resize_linear, resize_nearest
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.finite import require_finite_logits
from voxdino.inference.gate import gate_for
from voxdino.inference.parts import (
    LOGIT_BYTES,
    Part,
    background_logits,
    in_plane,
    normalised_slab,
    read_part,
    slab_weight,
    slice_bytes,
    slice_ranges,
)
from voxdino.inference.settings import PredictSettings
from voxdino.inference.tiles import Box, Seen, blend, blend_slabs, gaussian_weight, shares, tile_boxes
from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.orientation import CaseGeometry, restore_labels
from voxdino.preparation.plan import Plan
from voxdino.preparation.slices import slice_case

Network = Callable[[Float[np.ndarray, "B C Dk h w"]], Float[np.ndarray, "B K D h w"]]
Slab = tuple[int, Float[np.ndarray, "d K h w"]]

_MIRRORS: tuple[tuple[int, ...], ...] = ((-1,), (-2,), (-2, -1))


def segment(
    network: Network, plan: Plan, volume: Volume, settings: PredictSettings, *, case: str, slices_at_once: int
) -> LabelMap:
    """The label map of a volume on its own grid, as `predict_volume` makes it of one model.

    slices_at_once: crops in a pass of the network. Errors: those of `predict_volume`.
    """
    slices, geometry = slice_case(case, volume, plan)
    gate = gate_for(plan, slices.scaling, settings.gate)
    num_bytes, overlap = slice_bytes(plan, slices.shape[2:]), settings.overlap
    ranges = slice_ranges(plan, slices.shape[1], overlap=overlap, slice_bytes=num_bytes, logit_bytes=LOGIT_BYTES)
    tiler = _Tiler(network, plan, settings, slices_at_once)
    parts = (read_part(slices, plan, gate, *ends) for ends in ranges)
    if plan.slab > 1:
        slabs = tiler.blended(parts, slices.scaling, slices.size, slab_weight(ranges))
    else:
        slabs = ((part.first, tiler.logits(part, slices.scaling, slices.size)) for part in parts)
    return export_labels(slabs, geometry, plan.labels)


class _Tiler:
    """From parts to the logits of whole slices."""

    def __init__(self, network: Network, plan: Plan, settings: PredictSettings, slices_at_once: int) -> None:
        self._network, self._plan, self._settings = network, plan, settings
        self._at_once = slices_at_once
        self._weight = gaussian_weight(plan.tile)
        self._nothing = background_logits(plan.labels)[None, :, None, None]

    def logits(
        self, part: Part, scaling: Sequence[ChannelScaling], size: tuple[int, int]
    ) -> Float[np.ndarray, "d K H W"]:
        shape = (part.last - part.first, self._nothing.shape[1], *size)
        if part.raw is None:
            return np.broadcast_to(self._nothing, shape)
        slab, places = normalised_slab(part.raw, scaling, self._plan.tile)
        seen = self._tiled(slab)[..., places[0], places[1]]
        if seen.shape[2:] == size:
            return seen
        whole = np.broadcast_to(self._nothing, shape).copy()
        whole[:, :, slice(*part.rows), slice(*part.columns)] = seen
        return whole

    def blended(
        self, parts: Iterable[Part], scaling: Sequence[ChannelScaling], size: tuple[int, int], weight: Sequence[float]
    ) -> Iterator[Slab]:
        """Slice by slice, from slabs that overlap, of which only one is held. `weight`: of a slab's slices."""
        held = np.zeros((len(weight), self._nothing.shape[1] + 1, *size), dtype=np.float32)
        seen = ((part.first, self._seen_of(part, scaling)) for part in parts)
        for position, values in blend_slabs(seen, weight, held):
            yield position, values[None, :-1] + self._nothing * (1 - values[-1])

    def _seen_of(self, part: Part, scaling: Sequence[ChannelScaling]) -> Iterator[Seen]:
        if part.raw is None:
            return
        slab, places = normalised_slab(part.raw, scaling, self._plan.tile)
        size = slab.shape[2:]
        boxes = tile_boxes(size, self._plan.tile, self._settings.overlap)
        for box, share in zip(boxes, shares(boxes, self._weight, np.zeros(size, np.float32)), strict=True):
            there, here = in_plane(part, places, box)
            yield there, self._seen(slab, box)[..., here[0], here[1]], share[here]

    def _tiled(self, slab: Float[np.ndarray, "C Dk H W"]) -> Float[np.ndarray, "d K H W"]:
        rows, columns = slab.shape[2:]
        boxes = tile_boxes((rows, columns), self._plan.tile, self._settings.overlap)
        beside = 2 * self._plan.context_slices
        depth = slab.shape[1] - beside
        step = min(depth, self._at_once)
        out = np.zeros((depth, self._nothing.shape[1], rows, columns), dtype=np.float32)
        for start in range(0, depth, step):
            part = slab[:, start : start + step + beside]
            if len(boxes) == 1:
                out[start : start + step] = self._seen(part, boxes[0])
            else:
                blend(((box, self._seen(part, box)) for box in boxes), self._weight, out[start : start + step])
        return out

    def _seen(self, part: Float[np.ndarray, "C n H W"], box: Box) -> Float[np.ndarray, "d K h w"]:
        """One tile of some slices: as one slab where the model sees slabs, else every slice by itself."""
        crop = part[(slice(None), slice(None), *box)]
        width = crop.shape[1] if self._plan.slab > 1 else 1 + 2 * self._plan.context_slices
        crops = np.stack([crop[:, first : first + width] for first in range(crop.shape[1] - width + 1)])
        logits = self._network(crops)
        if self._settings.mirror:
            for axes in _MIRRORS:
                logits = logits + np.flip(self._network(np.ascontiguousarray(np.flip(crops, axes))), axes)
            logits = logits / 4
        slices = logits.swapaxes(1, 2)  # (B, D, K, h, w), one of B and D is 1
        return slices.reshape(-1, *slices.shape[2:])


def export_labels(slabs: Iterable[Slab], geometry: CaseGeometry, labels: LabelSet) -> LabelMap:
    """The label map, in file ids on the original grid, of logits that come slab by slab.

    Errors: CheckpointError for NaN among the logits.
    """
    _, rows, columns = geometry.native_shape
    dtype = np.uint8 if labels.num_classes <= np.iinfo(np.uint8).max else np.int32
    indices = np.zeros(geometry.native_shape, dtype=dtype)
    for first, logits in slabs:
        require_finite_logits(bool(np.isfinite(logits.sum())), first)
        for offset, scores in enumerate(logits):
            indices[first + offset] = class_indices(scores, (rows, columns), labels)
    restored = restore_labels(indices, geometry)
    return LabelMap(labels.to_ids(restored.array), restored.grid)


def class_indices(
    logits: Float[np.ndarray, "K h w"], size: tuple[int, int], labels: LabelSet
) -> Int[np.ndarray, "H W"]:
    """As `export.class_indices`, one class at a time."""
    chosen = np.zeros(size, dtype=np.int32)
    if labels.regions:
        for scores, region_id in zip(logits, labels.region_ids, strict=True):
            chosen[_resized(scores, size) > 0] = labels.ids.index(region_id) if region_id in labels.ids else 0
        return chosen
    best = _resized(logits[0], size)
    for index in range(1, len(logits)):
        scores = _resized(logits[index], size)
        better = scores > best  # equal scores: the first class, as argmax
        chosen[better] = index
        best = np.maximum(best, scores)
    return chosen


def _resized(scores: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """As `export.resize_scores`: linear along an axis that grows, nearest along one that shrinks."""
    if scores.shape == size:
        return scores
    smaller = [min(old, new) for old, new in zip(scores.shape, size, strict=True)]
    return resize_linear(resize_nearest(scores, smaller, (0, 1)), size, (0, 1))
