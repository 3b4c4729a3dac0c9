"""What training minimises: cross-entropy + soft Dice, for classes and for overlapping regions."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from voxdino.core.errors import ConfigError
from voxdino.core.labels import LabelSet
from voxdino.models.registry import look_up
from voxdino.training.losses_lesion import LESION_LOSSES

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, K, H, W), class indices (N, H, W) -> scalar

SMOOTH = 1e-5
ABSENT_MASS = 10.0  # voxels; below it DINO-Med3D counts an absent class as found


def dice_cross_entropy(
    logits: Float[Tensor, "N K *spatial"], labels: Int[Tensor, "N *spatial"], *, ignore_index: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy + (1 - soft Dice), 1:1, over the voxels that are not ignored.

    Dice is pooled over the batch, averaged over the foreground classes (1 ..) that the batch holds; cross-entropy alone
    speaks for absent ones, whose Dice is 0 whatever the model does. All voxels ignored: 0, with a gradient of 0.
    """
    cross_entropy, overlap, predicted, present = _count(logits, labels, ignore_index)
    return cross_entropy + _one_minus_dice(overlap[1:], predicted[1:], present[1:])


def dinomed3d(
    logits: Float[Tensor, "N K *spatial"],
    labels: Int[Tensor, "N *spatial"],
    *,
    ignore_index: int,
    members: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, ""]:
    """0.2 mean cross-entropy + 0.8 (1 - soft Dice), as released with DINO-Med3D (arXiv 2606.18886; dossier 1.5).

    Dice is pooled over the batch, averaged over all foreground classes; one that the batch does not hold counts 1 while
    the probabilities for it sum to less than 10 voxels, and nearly 0 beyond. Ignored voxels count nowhere.

    members: of regions, as below; then with binary cross-entropy (not in the release).
    """
    if members is None:
        cross_entropy, *counts = _count(logits, labels, ignore_index)
        overlap, predicted, present = (count[1:] for count in counts)
    else:
        cross_entropy, overlap, predicted, present = _count_regions(logits, labels, ignore_index, members)
    dice = (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)
    dice = torch.where((present == 0) & (predicted < ABSENT_MASS), 1, dice)
    return 0.2 * cross_entropy + 0.8 * (1 - dice.mean())


def _count(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropy; probabilities of a class where it is, everywhere, and its voxels, (K,) each, batch-pooled."""
    num_classes = logits.shape[1]
    valid = labels != ignore_index  # (N, *spatial)
    safe = torch.where(valid, labels, 0)
    log_probs = F.log_softmax(logits.float(), dim=1)
    log_true = log_probs.gather(1, safe.unsqueeze(1)).squeeze(1)  # (N, *spatial)
    cross_entropy = -torch.where(valid, log_true, 0).sum() / valid.sum().clamp(min=1)

    probs = log_probs.exp() * valid.unsqueeze(1)
    predicted = probs.sum([0, *range(2, logits.ndim)])  # (K,)
    flat, weight = safe.flatten(), valid.flatten().to(probs.dtype)
    overlap = probs.new_zeros(num_classes).index_add(0, flat, log_true.exp().flatten() * weight)
    present = probs.new_zeros(num_classes).index_add(0, flat, weight)
    return cross_entropy, overlap, predicted, present


def dice_binary_cross_entropy(
    logits: Float[Tensor, "N R *spatial"],
    labels: Int[Tensor, "N *spatial"],
    *,
    ignore_index: int,
    members: Sequence[Sequence[int]],
) -> Float[Tensor, ""]:
    """Mean binary cross-entropy + (1 - soft Dice) of sigmoids, for regions that may overlap.

    members: for each output, the class indices that belong to it. Ignored voxels and absent regions as above.
    """
    cross_entropy, overlap, predicted, present = _count_regions(logits, labels, ignore_index, members)
    return cross_entropy + _one_minus_dice(overlap, predicted, present)


def _count_regions(
    logits: Tensor, labels: Tensor, ignore_index: int, members: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_count`, of sigmoids and with binary cross-entropy."""
    valid = (labels != ignore_index).unsqueeze(1)
    target = torch.stack([_is_any(labels, region) for region in members], dim=1).to(torch.float32)
    logits = logits.float()
    voxelwise = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    cross_entropy = torch.where(valid, voxelwise, 0).sum() / (valid.sum() * len(members)).clamp(min=1)
    probs, target = logits.sigmoid() * valid, target * valid
    axes = [0, *range(2, logits.ndim)]
    return cross_entropy, (probs * target).sum(axes), probs.sum(axes), target.sum(axes)


def _one_minus_dice(overlap: Tensor, predicted: Tensor, present: Tensor) -> Tensor:
    dice = (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)
    held = (present > 0).to(dice.dtype)
    return ((1 - dice) * held).sum() / held.sum().clamp(min=1)


def _is_any(labels: Tensor, members: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(members, device=labels.device))


def cross_entropy_only(
    logits: Float[Tensor, "N K *spatial"], labels: Int[Tensor, "N *spatial"], *, ignore_index: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the voxels that are not ignored; 0 where all are."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


LOSSES: dict[str, Callable[..., Tensor]] = {  # for exclusive classes
    "dice_ce": dice_cross_entropy,
    "ce": cross_entropy_only,
    "dinomed3d": dinomed3d,
    **LESION_LOSSES,
}

REGION_LOSSES: dict[str, Callable[..., Tensor]] = {  # for regions that may overlap; they take `members`
    "dice_ce": dice_binary_cross_entropy,
    "dinomed3d": dinomed3d,
    **LESION_LOSSES,
}


def choose_loss(
    name: str, labels: LabelSet, *, ignore_index: int, spacing: tuple[float, float, float] | None = None
) -> Loss:
    """The named loss for the outputs of a label set.

    spacing: (slice, row, column) size of a voxel, for losses that measure distances; None: cubes.
    Errors: UsageError for an unknown name; ConfigError where the outputs are regions, which it is not for.
    """
    loss = look_up(LOSSES, name, kind="loss")
    settings: dict[str, Any] = {"ignore_index": ignore_index}
    if spacing is not None and "spacing" in signature(loss).parameters:
        settings["spacing"] = tuple(size / min(spacing[1:]) for size in spacing)  # in voxels, as the loss is weighted
    if not labels.regions:
        return partial(loss, **settings)
    if name not in REGION_LOSSES:
        fact = f"loss {name!r} is for exclusive classes; this data set's outputs are regions, which may overlap"
        raise ConfigError(fact, where="loss", fix=f"--set loss={'|'.join(REGION_LOSSES)}.")
    return partial(REGION_LOSSES[name], **settings, members=labels.region_members())
