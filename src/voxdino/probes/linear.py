"""Regularised logistic regression on frozen features, the strength of the penalty chosen on validation cases."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxdino.core.errors import DatasetError
from voxdino.core.labels import LabelKind
from voxdino.models.heads.objectives import OBJECTIVES
from voxdino.probes.calibration import fit_temperature
from voxdino.probes.fitting import STRENGTHS, choose, fit_logistic, linear_logits, standardised

FEWEST = 2  # training features


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of frozen features.

    strength:    of the penalty; held_out: strength -> loss on the validation cases, in nats.
    weight:      of features less `mean`, divided by `sd`; the last column holds the offsets.
    temperature: the logits are divided by it; 1.0 where no calibration was asked for.
    """

    kind: LabelKind
    num_classes: int
    strength: float
    held_out: dict[float, float]
    weight: Float[Tensor, "O E1"]
    mean: Float[Tensor, " E"]
    sd: Float[Tensor, " E"]
    temperature: float = 1.0

    def logits(self, features: Float[Tensor, "M E"]) -> Float[Tensor, "M O"]:
        """As the objective of the labels' kind reads them, before the temperature."""
        return linear_logits((features.detach().cpu().double() - self.mean) / self.sd, self.weight)

    def probabilities(self, features: Float[Tensor, "M E"]) -> Float[Tensor, "M K"]:
        """Of each class; rows sum to 1 but for several labels."""
        return OBJECTIVES[self.kind].probabilities(self.logits(features) / self.temperature)


def fit_linear_probe(
    features: Float[Tensor, "N E"],
    labels: Int[Tensor, " N"] | Int[Tensor, "N K"],
    validation_features: Float[Tensor, "V E"],
    validation_labels: Int[Tensor, " V"] | Int[Tensor, "V K"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    kind: LabelKind = "single",
    num_classes: int | None = None,
    calibrate: bool = False,
    max_iterations: int = 500,
) -> LinearProbe:
    """Fit by L-BFGS in float64 to standardised features; of the strengths, the one of the smallest validation loss.

    The problem is convex: the result depends on the features alone, not on a seed or a learning rate.
    labels:      classes 0 .. K - 1, or 0 and 1 (N, K) for kind "multi".
    num_classes: K; None: one more than the largest label there is.
    calibrate:   fit one temperature to the validation cases.
    Errors: DatasetError for fewer than two classes.
    """
    train_labels, held_labels = labels.cpu(), validation_labels.cpu()
    number = num_classes or _num_classes(train_labels, held_labels)
    _require_two(train_labels, kind)
    x, mean, sd = standardised(features.detach().cpu().double())
    held = (validation_features.detach().cpu().double() - mean) / sd
    loss = OBJECTIVES[kind].loss
    found = choose(
        strengths,
        lambda strength, start: fit_logistic(
            x, train_labels, number, strength, kind=kind, start=start, max_iterations=max_iterations
        ),
        lambda weights: float(loss(linear_logits(held, weights), held_labels)),
    )
    probe = LinearProbe(kind, number, found.strength, found.losses, found.weights, mean, sd)
    if not calibrate:
        return probe
    return replace(probe, temperature=fit_temperature(probe.logits(validation_features), held_labels, kind))


def _num_classes(*labels: Tensor) -> int:
    return labels[0].shape[1] if labels[0].ndim == 2 else 1 + max(int(one.max()) for one in labels)


def _require_two(labels: Tensor, kind: LabelKind) -> None:
    num_kinds = len(torch.unique(labels))
    if num_kinds < 2 or len(labels) < FEWEST:
        what = "cases with and without a label" if kind == "multi" else "two classes"
        fact = f"{len(labels)} training examples of {num_kinds} classes are too few to fit a classifier"
        raise DatasetError(fact, fix=f"give examples of {what} at least.")
