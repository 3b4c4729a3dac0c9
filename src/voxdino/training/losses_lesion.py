"""Losses for structures that are small against the crop, for classes and for overlapping regions.

All of them pool the batch, average over the foreground outputs that the batch holds, and leave ignored voxels out.
`members`: None for exclusive classes (softmax, output 0 is background); else, for each output, the class indices that
belong to its region (sigmoid). A batch of nothing but ignored voxels costs 0, with a gradient of 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5
FALSE_POSITIVES, FALSE_NEGATIVES = 0.3, 0.7  # weights in the Tversky index: what is missed costs more
GAMMA = 2
BOUNDARY_WEIGHT = 0.01  # of a voxel's distance; where the published weight starts
_BLOCK = 1 << 20  # sums held at once while distances are computed

Members = Sequence[Sequence[int]]


def tversky_cross_entropy(
    logits: Float[Tensor, "N K *spatial"],
    labels: Int[Tensor, "N *spatial"],
    *,
    ignore_index: int,
    members: Members | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy + (1 - Tversky index), 1:1 (Salehi et al., arXiv 1706.05721; alpha 0.3, beta 0.7).

    The index is TP / (TP + 0.3 FP + 0.7 FN) of soft counts; with 0.5 and 0.5 it would be Dice.
    """
    claims = _claims(logits, labels, ignore_index, members)
    false_positives, false_negatives = claims.predicted - claims.overlap, claims.present - claims.overlap
    wrong = FALSE_POSITIVES * false_positives + FALSE_NEGATIVES * false_negatives
    return claims.cross_entropy() + claims.mean_of_held(
        1 - (claims.overlap + SMOOTH) / (claims.overlap + wrong + SMOOTH)
    )


def focal_dice(
    logits: Float[Tensor, "N K *spatial"],
    labels: Int[Tensor, "N *spatial"],
    *,
    ignore_index: int,
    members: Members | None = None,
) -> Float[Tensor, ""]:
    """Mean focal loss + (1 - soft Dice), 1:1 (Lin et al., arXiv 1708.02002; gamma 2).

    Each voxel's cross-entropy is scaled by (1 - p)^2 of what is true there, so that the many easy voxels of background
    weigh little. Without the paper's weight per class: Dice looks after the balance.
    """
    claims = _claims(logits, labels, ignore_index, members)
    focal = -(torch.expm1(claims.log_true) ** GAMMA * claims.log_true).sum() / claims.num
    return focal + claims.one_minus_dice()


def dice_cross_entropy_boundary(
    logits: Float[Tensor, "N K *spatial"],
    labels: Int[Tensor, "N *spatial"],
    *,
    ignore_index: int,
    members: Members | None = None,
    spacing: tuple[float, ...] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy + (1 - soft Dice) + 0.01 boundary loss (Kervadec et al., arXiv 1812.07032).

    Boundary loss: mean over voxels and foreground outputs of phi (p - g), phi the signed distance to the reference's
    boundary (`signed_distance`), p the probability, g the reference: a wrong voxel costs as much as it lies away. 0 for
    a perfect prediction. The weight is constant (the paper raises it from 0.01 in the course of the training). Where a
    sample does not hold an output, or nothing else, there is no boundary, and the other two terms speak alone.

    spacing: length of a voxel along each axis; None: 1. Ignored voxels make no boundary with their neighbours.
    """
    claims = _claims(logits, labels, ignore_index, members)
    valid = (labels != ignore_index).unsqueeze(1)
    phi = signed_distance(claims.target & valid, ~claims.target & valid, spacing).to(claims.probs.dtype)
    apart = (phi * (claims.probs - claims.target.to(phi.dtype)) * valid).sum()
    boundary = apart / (valid.sum() * claims.target.shape[1]).clamp(min=1)
    return claims.cross_entropy() + claims.one_minus_dice() + BOUNDARY_WEIGHT * boundary


@dataclass(frozen=True, eq=False)
class _Claims:
    """What logits say about a reference.

    log_true: log-probability of what is true: (N, *spatial) of classes, (N, R, *spatial) of regions; 0 where ignored.
    num:      of the entries of log_true that are not ignored, at least 1.
    probs, target: (N, F, *spatial) of the foreground outputs.
    overlap, predicted, present: (F,) soft counts: of the probabilities where it is, everywhere, and of its voxels.
    """

    log_true: Tensor
    num: Tensor
    probs: Tensor
    target: Tensor
    overlap: Tensor
    predicted: Tensor
    present: Tensor

    def cross_entropy(self) -> Tensor:
        return -self.log_true.sum() / self.num

    def one_minus_dice(self) -> Tensor:
        return self.mean_of_held(1 - (2 * self.overlap + SMOOTH) / (self.predicted + self.present + SMOOTH))

    def mean_of_held(self, values: Tensor) -> Tensor:
        """Over the outputs that the batch holds; 0 where it holds none."""
        held = (self.present > 0).to(values.dtype)
        return (values * held).sum() / held.sum().clamp(min=1)


def _claims(logits: Tensor, labels: Tensor, ignore_index: int, members: Members | None) -> _Claims:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    valid = labels != ignore_index  # (N, *spatial)
    if members is None:
        log_probs = F.log_softmax(logits, dim=1)
        log_true = log_probs.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
        probs, counted = log_probs[:, 1:].exp(), valid
        classes = torch.arange(1, logits.shape[1], device=labels.device)
        target = labels.unsqueeze(1) == classes.reshape(-1, *[1] * (labels.ndim - 1))
    else:
        groups = [torch.isin(labels, torch.tensor(region, device=labels.device)) for region in members]
        target, counted = torch.stack(groups, dim=1), valid.unsqueeze(1).expand(logits.shape)
        log_true, probs = F.logsigmoid(torch.where(target, logits, -logits)), logits.sigmoid()
    inside = probs * valid.unsqueeze(1)
    axes = [0, *range(2, logits.ndim)]
    return _Claims(
        log_true=torch.where(counted, log_true, 0),
        num=counted.sum().clamp(min=1),
        probs=probs,
        target=target,
        overlap=(inside * target).sum(axes),
        predicted=inside.sum(axes),
        present=(target & valid.unsqueeze(1)).sum(axes).to(probs.dtype),
    )


@torch.no_grad()
def signed_distance(
    inside: Bool[Tensor, "N F *spatial"],
    outside: Bool[Tensor, "N F *spatial"],
    spacing: tuple[float, ...] | None = None,
) -> Float[Tensor, "N F *spatial"]:
    """Distance to the nearest voxel of `inside` minus that to the nearest of `outside`, between centres of voxels.

    It is at most -1 voxel inside and at least 1 outside. 0 throughout a map that lacks one of them. Voxels in neither
    (ignored ones) count as neither.
    """
    spacing = spacing or (1.0,) * (inside.ndim - 2)
    both = torch.stack((inside, outside)).flatten(0, 2)  # (2 N F, *spatial)
    to_inside, to_outside = squared_distance(both, spacing).sqrt().reshape(2, *inside.shape)
    return torch.where(to_inside.isinf() | to_outside.isinf(), 0, to_inside - to_outside)


def squared_distance(seeds: Bool[Tensor, "M *spatial"], spacing: tuple[float, ...]) -> Float[Tensor, "M *spatial"]:
    """Exact squared Euclidean distance to the nearest seed of each map; infinite where it has none. On its device.

    One axis after the other, the least of (distance so far + squared step) over each line (as in Felzenszwalb and
    Huttenlocher, Theory of Computing 2012, with all pairs in place of their envelope: lines are short).
    """
    squared = torch.where(seeds, 0.0, torch.inf)
    for axis, length in enumerate(spacing, start=1):
        places = torch.arange(squared.shape[axis], device=seeds.device) * length
        step = (places[:, None] - places).square()  # (L, L)
        lines = squared.movedim(axis, -1)
        flat = lines.reshape(-1, len(places))
        portions = torch.split(flat, max(1, _BLOCK // step.numel()))
        parts = [(part[:, None] + step).amin(-1) for part in portions]
        squared = torch.cat(parts).reshape(lines.shape).movedim(-1, axis)
    return squared


LESION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "tversky_ce": tversky_cross_entropy,
    "focal_dice": focal_dice,
    "dice_ce_boundary": dice_cross_entropy_boundary,
}
