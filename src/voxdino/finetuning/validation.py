"""Dice during training: fast, at prepared resolution, over held-back slices. `evaluate` measures for real."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from voxdino.core.labels import LabelSet
from voxdino.training.loop import Validation


def validate(
    batches: Iterable[Any],
    predict: Callable[[Any], Tensor],
    labels: LabelSet,
    *,
    ignore_index: int,
    stop: Callable[[], bool],
) -> Validation | None:
    """Dice per class (or region), over all voxels of all batches together; None where `stop` said so.

    A class that is neither in a reference nor predicted has no Dice and does not enter the mean; with no class at all
    the mean is 1 (nothing to find, nothing claimed).
    """
    names = [region.name for region in labels.regions] or [name for name, _ in labels.foreground]
    counts = torch.zeros(3, len(names), dtype=torch.int64)
    with torch.inference_mode():
        for batch in batches:
            if stop():
                return None
            found = predicted_masks(predict(batch), regions=bool(labels.regions))
            truth = reference_masks(batch.label, labels.region_members() or [(i,) for i in range(1, len(names) + 1)])
            valid = (batch.label != ignore_index).unsqueeze(1)
            counts += _overlap_counts(found & valid, truth & valid).cpu()
    overlap, num_found, num_true = counts.tolist()
    dice = [2 * o / (f + t) if f + t else None for o, f, t in zip(overlap, num_found, num_true, strict=True)]
    known = [value for value in dice if value is not None]
    return Validation(sum(known) / len(known) if known else 1.0, dict(zip(names, dice, strict=True)))


def predicted_masks(logits: Float[Tensor, "B K *spatial"], *, regions: bool) -> Bool[Tensor, "B F *spatial"]:
    """A mask per foreground class (the largest logit) or per region (a logit above 0)."""
    if regions:
        return logits > 0
    winner = logits.argmax(1)
    return torch.stack([winner == index for index in range(1, logits.shape[1])], dim=1)


def reference_masks(label: Int[Tensor, "B *spatial"], members: Sequence[Sequence[int]]) -> Bool[Tensor, "B F *spatial"]:
    """A mask per output: the voxels of any of its class indices."""
    return torch.stack([torch.isin(label, torch.tensor(one, device=label.device)) for one in members], dim=1)


def _overlap_counts(found: Bool[Tensor, "B F *spatial"], truth: Bool[Tensor, "B F *spatial"]) -> Int[Tensor, "3 F"]:
    axes = [0, *range(2, found.ndim)]
    return torch.stack([(found & truth).sum(axes), found.sum(axes), truth.sum(axes)])
