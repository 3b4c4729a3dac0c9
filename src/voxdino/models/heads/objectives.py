"""What the outputs of a classifier mean, for one class of many, several labels, and classes in an order."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from voxdino.core.labels import LabelKind


@dataclass(frozen=True)
class Objective:
    """How K classes are told with O outputs.

    num_outputs:   K -> O.
    loss:          (logits (N, O), labels: (N,) classes or (N, K) of 0 and 1) -> mean loss, in nats.
    probabilities: (N, O) -> (N, K); rows sum to 1 but for several labels.
    tied:          all outputs share one direction in the features and differ in their offset.
    """

    num_outputs: Callable[[int], int]
    loss: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor]
    tied: bool = False


def _several(logits: Float[Tensor, "N K"], labels: Int[Tensor, "N K"]) -> Float[Tensor, ""]:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _ordered(logits: Float[Tensor, "N O"], labels: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Output k says whether the class is above k (CORAL: Cao et al., arXiv 1901.07884)."""
    above = labels[:, None] > torch.arange(logits.shape[1], device=labels.device)
    return F.binary_cross_entropy_with_logits(logits, above.to(logits.dtype))


def _between(logits: Float[Tensor, "N O"]) -> Float[Tensor, "N K"]:
    """Of each class, from those of being above each."""
    above = F.pad(F.pad(logits.sigmoid(), (1, 0), value=1.0), (0, 1), value=0.0)  # (N, K + 1)
    shares = (above[:, :-1] - above[:, 1:]).clamp(min=0)
    return shares / shares.sum(1, keepdim=True)


OBJECTIVES: dict[LabelKind, Objective] = {
    "single": Objective(lambda number: number, F.cross_entropy, lambda logits: logits.softmax(1)),
    "multi": Objective(lambda number: number, _several, torch.sigmoid),
    "ordinal": Objective(lambda number: number - 1, _ordered, _between, tied=True),
}
