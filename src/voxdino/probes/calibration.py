"""Probabilities that mean what they say: one temperature for all logits (Guo et al., arXiv 1706.04599)."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from voxdino.core.labels import LabelKind
from voxdino.models.heads.objectives import OBJECTIVES
from voxdino.probes.fitting import minimise

MOST = 100.0  # temperatures lie between 1 / MOST and MOST: separable logits have no best one


def fit_temperature(
    logits: Float[Tensor, "N O"], labels: Int[Tensor, " N"] | Int[Tensor, "N K"], kind: LabelKind = "single"
) -> float:
    """The temperature that logits are divided by for the smallest loss on these (held-back) labels.

    The order of the classes stays, and so do accuracy and AUROC.
    """
    values, loss = logits.detach().cpu().double(), OBJECTIVES[kind].loss

    def scale(place: Tensor) -> Tensor:
        return (math.log(MOST) * place.tanh()).exp()

    found = minimise(lambda place: loss(values * scale(place), labels.cpu()), values.new_zeros(1), 100)
    return 1 / float(scale(found))
