"""Linear layers on frozen features: fitted to the minimum, the same every time, the penalty chosen on held-out ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from voxdino.models.backbones.base import Backbone

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the penalty, strong to weak: each fit starts where the last one ended
HELD_OUT = 5  # every fifth example of the training part chooses the strength

_ROUNDING = 1e-5  # a channel whose spread is a smaller share of its size is constant: float32 was here


def fit_logistic(
    features: Float[Tensor, "N E"],
    classes: Int[Tensor, " N"],
    num_classes: int,
    strength: float,
    *,
    start: Float[Tensor, "K E1"] | None = None,
    max_iterations: int = 500,
) -> Float[Tensor, "K E1"]:
    """Weights and, in the last column, biases that minimise mean cross-entropy + strength / 2 * |weights|^2.

    The biases are not penalised. The problem is convex: where it starts does not matter.
    """
    first = features.new_zeros(num_classes, features.shape[1] + 1) if start is None else start
    return minimise(
        lambda weights: F.cross_entropy(linear_logits(features, weights), classes) + penalty(weights, strength),
        first,
        max_iterations,
    )


@dataclass(frozen=True, eq=False)
class Choice:
    """The best strength, the weights it gave, and (accuracy, loss) of all."""

    strength: float
    weights: Tensor
    scores: dict[float, tuple[float, float]]


def choose(
    strengths: Sequence[float],
    fit: Callable[[float, Tensor | None], Tensor],
    score: Callable[[Tensor], tuple[float, float]],
) -> Choice:
    """Fit with every strength, strong to weak, each from where the last one ended; the best score wins, then the
    smallest loss, then the stronger penalty.
    """
    weights: Tensor | None = None
    fits: dict[float, Tensor] = {}
    for strength in sorted(set(strengths), reverse=True):
        weights = fit(strength, weights)
        fits[strength] = weights
    scores = {strength: score(found) for strength, found in fits.items()}
    best = min(scores, key=lambda strength: (-scores[strength][0], scores[strength][1], -strength))
    return Choice(best, fits[best], scores)


@torch.enable_grad()
def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int) -> Tensor:
    """Where a smooth convex function is smallest, by L-BFGS with a strong Wolfe line search."""
    weights = start.detach().clone().requires_grad_(True)
    precise = start.dtype == torch.float64
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-9 if precise else 1e-6,
        tolerance_change=1e-14 if precise else 1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimiser.zero_grad()
        value = loss(weights)
        value.backward()
        return float(value.detach())

    optimiser.step(closure)
    return weights.detach()


def linear_logits(features: Float[Tensor, "*N E"], weights: Float[Tensor, "K E1"]) -> Float[Tensor, "*N K"]:
    """The last column of `weights` holds the biases."""
    return F.linear(features, weights[:, :-1], weights[:, -1])


def penalty(weights: Tensor, strength: float) -> Tensor:
    return strength / 2 * weights[:, :-1].square().sum()


def standardised(features: Float[Tensor, "*N E"]) -> tuple[Tensor, Tensor, Tensor]:
    """Features less their mean, divided by their standard deviation, and both; constant channels stay zero."""
    flat = features.reshape(-1, features.shape[-1])
    mean, sd = flat.mean(0), flat.std(0, unbiased=False)
    sd = torch.where(sd > _ROUNDING * (1 + mean.abs()), sd, torch.ones_like(sd))
    return (features - mean) / sd, mean, sd


def spread(length: int, number: int | None) -> NDArray[np.int64]:
    """Up to `number` of `length` places, evenly spread, ascending; None: all."""
    if number is None or number >= length:
        return np.arange(length)
    return ((np.arange(number) + 0.5) * length / max(number, 1)).astype(np.int64)


def device_of(module: nn.Module) -> torch.device:
    """Of its first parameter; the CPU where it has none."""
    first = next(iter(module.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def require_eval(backbone: Backbone) -> None:
    assert not backbone.training, "a probe reads a backbone in eval mode"
    assert backbone.depth > 0, "a probe needs a backbone"
