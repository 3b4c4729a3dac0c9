"""Numbers of a set of features: over how many directions they spread, and how sure a teacher's targets are."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ROUNDING = 1e-5  # features that differ by less than this share of their size do not differ: float32 was here


def effective_rank(features: Float[Tensor, "N E"]) -> float:
    """How many directions features spread over, from 1 to min(N - 1, E): exp of the entropy of the singular values.

    Of the centred features, singular values as shares of their sum (Roy and Vetterli, EUSIPCO 2007). 0.0 where all
    features are the same (but for rounding); NaN where any is not finite.
    """
    values = features.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        return math.nan
    singular = torch.linalg.svdvals(values - values.mean(0))
    if float(singular.max()) <= _ROUNDING * float(values.norm()):
        return 0.0
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


def feature_spread(features: Float[Tensor, "N E"]) -> float:
    """Standard deviation of L2-normalised features, averaged over channels, times sqrt(E).

    About 1 for features that point anywhere, 0 for features that all point the same way (SimSiam, arXiv 2011.10566).
    """
    unit = F.normalize(features.detach().cpu().double(), dim=1)
    return float(unit.std(0, unbiased=False).mean()) * math.sqrt(features.shape[1])


def target_entropy(targets: Float[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Mean entropy of the rows of a teacher's targets, in nats: 0 for one-hot, log K for even ones."""
    mean: Tensor = torch.special.entr(targets.detach().float()).sum(1).mean()
    return mean
