"""Linear layers on frozen features: fitted to the minimum, the same every time, the penalty chosen on held-out ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from voxdino.core.labels import LabelKind
from voxdino.models.backbones.base import Backbone
from voxdino.models.heads.objectives import OBJECTIVES

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)  # of the penalty: each fit starts from the one before
DECADES = STRENGTHS[::2]  # for fits that take long

_ROUNDING = 1e-5  # a channel whose spread is a smaller share of its size is constant: float32 was here


def fit_logistic(
    features: Float[Tensor, "N E"],
    labels: Int[Tensor, " N"] | Int[Tensor, "N K"],
    num_classes: int,
    strength: float,
    *,
    kind: LabelKind = "single",
    start: Float[Tensor, "O E1"] | None = None,
    max_iterations: int = 500,
) -> Float[Tensor, "O E1"]:
    """Weights and, in the last column, biases that minimise mean loss + strength / 2 * |weights|^2.

    The biases are not penalised. The problem is convex: where it starts does not matter. With fewer examples than
    features it is solved in the space that the examples span, where the minimum lies.
    """
    if len(features) < features.shape[1]:
        basis, coordinates = torch.linalg.qr(features.T)  # (E, N), (N, N)
        inside = None if start is None else torch.cat((start[:, :-1] @ basis, start[:, -1:]), dim=1)
        found = fit_logistic(
            coordinates.T, labels, num_classes, strength, kind=kind, start=inside, max_iterations=max_iterations
        )
        return torch.cat((found[:, :-1] @ basis.T, found[:, -1:]), dim=1)
    objective = OBJECTIVES[kind]
    num_outputs = objective.num_outputs(num_classes)
    first = features.new_zeros(num_outputs, features.shape[1] + 1) if start is None else start

    root = _curvature_root(features, strength)

    def used(scaled: Tensor) -> Tensor:
        weights = torch.linalg.solve_triangular(root, scaled[:, :-1], upper=False, left=False)
        if objective.tied:
            weights = weights.mean(0, keepdim=True).expand(num_outputs, -1)
        return torch.cat((weights, scaled[:, -1:]), dim=1)

    def loss(scaled: Tensor) -> Tensor:
        weights, share = used(scaled), num_outputs if objective.tied else 1  # the one direction counts once
        return objective.loss(linear_logits(features, weights), labels) + penalty(weights, strength) / share

    scaled = torch.cat((first[:, :-1] @ root, first[:, -1:]), dim=1)
    return used(minimise(loss, scaled, max_iterations))


def _curvature_root(features: Float[Tensor, "N E"], strength: float) -> Float[Tensor, "E E"]:
    """Lower factor of features' features / 4 N + strength, which bounds the curvature of a logistic loss.

    In coordinates of which it is the unit, L-BFGS needs a tenth of the iterations.
    """
    curvature = features.T @ features / (4 * len(features))
    curvature.diagonal().add_(strength)
    root: Tensor = torch.linalg.cholesky(curvature)
    return root


@dataclass(frozen=True, eq=False)
class Choice:
    """The best strength, the weights it gave, and the losses of all."""

    strength: float
    weights: Tensor
    losses: dict[float, float]


def choose(
    strengths: Sequence[float],
    fit: Callable[[float, Tensor | None], Tensor],
    loss: Callable[[Tensor], float],
) -> Choice:
    """Fit with every strength, strong to weak, each from where the last one ended; the smallest loss (on cases that
    were not fitted to) wins, then the stronger penalty.
    """
    weights: Tensor | None = None
    fits: dict[float, Tensor] = {}
    for strength in sorted(set(strengths), reverse=True):
        weights = fit(strength, weights)
        fits[strength] = weights
    losses = {strength: loss(found) for strength, found in fits.items()}
    best = min(losses, key=lambda strength: (losses[strength], -strength))
    return Choice(best, fits[best], losses)


@torch.enable_grad()
def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int) -> Tensor:
    """Where a smooth convex function is smallest, by L-BFGS with a strong Wolfe line search."""
    weights = start.detach().clone().requires_grad_(True)
    precise = start.dtype == torch.float64
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-8 if precise else 1e-6,
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
