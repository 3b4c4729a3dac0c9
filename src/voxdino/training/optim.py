"""AdamW over the groups a model names, and the running average of its trainable weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW


def build_optimizer(groups: Sequence[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999)) -> AdamW:
    """AdamW. groups: as `Segmenter.parameter_groups` gives them: params, lr, weight_decay."""
    optimizer = AdamW(list(groups), betas=betas, fused=True)
    for group in optimizer.param_groups:
        group["full_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: AdamW, factor: float) -> None:
    """Set every group to `factor` times its configured learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


class WeightAverage:
    """Exponential moving average of parameters: steadier than the last step, and what is validated and kept.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so a short run is not held back by its
    random start.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self._names = list(parameters)
        self._live = [parameter.data for parameter in parameters.values()]
        self._average = [parameter.detach().clone() for parameter in parameters.values()]

    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)
        self.num_updates += 1

    def state(self) -> dict[str, Tensor]:
        """The averaged tensors by parameter name (not copies)."""
        return dict(zip(self._names, self._average, strict=True))

    def load(self, state: dict[str, Tensor], num_updates: int) -> None:
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])
        self.num_updates = num_updates

    def swap(self) -> None:
        """Exchange live weights and average, in place. Call it twice around a validation."""
        for live, average in zip(self._live, self._average, strict=True):
            held = live.clone()
            live.copy_(average)
            average.copy_(held)
