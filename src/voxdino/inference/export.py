"""From logits on prepared slices to labels on the case's own grid, slice by slice: never the scores of a volume."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap
from voxdino.inference.finite import require_finite_logits
from voxdino.preparation.orientation import CaseGeometry, restore_labels

BYTES_AT_ONCE = 64 << 20  # of scores in the original size: bounds the memory for any number of classes


def export_labels(
    slabs: Iterable[tuple[int, Float[Tensor, "d K h w"]]], geometry: CaseGeometry, labels: LabelSet
) -> LabelMap:
    """The label map, in file ids on the original grid, of logits that come slab by slab as (first slice, logits).

    Errors: CheckpointError for NaN among the logits, which an argmax would take for a class.
    """
    _, rows, columns = geometry.native_shape
    dtype = torch.uint8 if labels.num_classes <= torch.iinfo(torch.uint8).max else torch.int32
    indices: Tensor | None = None  # on the device of the logits: one copy to the host, at the end
    earlier: tuple[int, Tensor] | None = None
    for first, logits in slabs:
        if indices is None:
            indices = torch.zeros(geometry.native_shape, dtype=dtype, device=logits.device)
        is_finite = torch.isfinite(logits.sum())  # NaN and infinity survive a sum
        for offset, scores in enumerate(logits):
            indices[first + offset] = class_indices(scores, (rows, columns), labels)
        _require_finite(earlier)  # of the slab before, so that a GPU need not wait
        earlier = first, is_finite
        del logits, scores  # before the next ones are made
    _require_finite(earlier)
    assert indices is not None, "a volume has slices"
    restored = restore_labels(indices.cpu().numpy(), geometry)
    del indices
    return LabelMap(labels.to_ids(restored.array), restored.grid)


def _require_finite(checked: tuple[int, Tensor] | None) -> None:
    if checked is not None:
        require_finite_logits(bool(checked[1]), checked[0])


def class_indices(logits: Float[Tensor, "K h w"], size: tuple[int, int], labels: LabelSet) -> Int[Tensor, "H W"]:
    """Class indices of one slice at `size`: the class of the largest score, or the regions written one over the other.

    Scores are brought to `size` before the decision; a few classes at a time, so that memory stays bounded.
    """
    at_once = max(1, BYTES_AT_ONCE // (4 * size[0] * size[1]))
    chosen = torch.zeros(size, dtype=torch.int32, device=logits.device)
    if labels.regions:
        for position, region_id in enumerate(labels.region_ids):
            index = labels.ids.index(region_id) if region_id in labels.ids else 0
            chosen[resize_scores(logits[position : position + 1], size)[0] > 0] = index
        return chosen
    best: Tensor | None = None
    for start in range(0, len(logits), at_once):
        values, classes = resize_scores(logits[start : start + at_once], size).max(dim=0)
        if best is None:
            best, chosen = values, classes.int()
        else:
            better = values > best  # equal scores: the first class, as argmax
            best, chosen = torch.where(better, values, best), torch.where(better, classes.int() + start, chosen)
    return chosen


def resize_scores(scores: Float[Tensor, "K h w"], size: tuple[int, int]) -> Float[Tensor, "K H W"]:
    """Scores at `size`, outer edges agreeing: linear along an axis that grows, nearest along one that shrinks.

    Nearest because prepared slices are finer than the original only where they were enlarged from it: the score
    nearest to an original voxel's centre is then the one that was made from this voxel.
    """
    for axis, new in zip((1, 2), size, strict=True):
        old = scores.shape[axis]
        if new < old:
            nearest = (2 * torch.arange(new, device=scores.device) + 1) * old // (2 * new)
            scores = scores.index_select(axis, nearest)
    if tuple(scores.shape[1:]) == size:
        return scores.float()
    return F.interpolate(scores.float()[None], size=size, mode="bilinear", align_corners=False)[0]
