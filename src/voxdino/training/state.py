"""All that a training is at one step, and how it becomes a checkpoint and comes back, bit for bit."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from voxdino.core.errors import CheckpointError
from voxdino.training.checkpoint import Checkpoint
from voxdino.training.optim import WeightAverage


@dataclass
class TrainingState:
    """step counts optimiser steps; the rest belongs to that moment.

    best:           averaged weights of the best validation, by parameter name; empty before the first.
    best_dice:      its mean Dice.
    validated_step: step of the last validation; num_stale: validations since the best one.
    num_skipped:    steps left out because the loss or a gradient was not finite; num_bad: of them, in a row until now.
    elapsed_s:      wall clock spent, earlier parts of a resumed run included.
    started_s:      of it, before the first step.
    """

    model: nn.Module
    optimizer: AdamW
    average: WeightAverage
    device: torch.device
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_dice: float = -1.0
    best_step: int = 0
    validated_step: int = -1
    num_stale: int = 0
    num_skipped: int = 0
    num_bad: int = 0
    elapsed_s: float = 0.0
    started_s: float = 0.0

    _COUNTERS = (
        "best_dice",
        "best_step",
        "validated_step",
        "num_stale",
        "num_skipped",
        "num_bad",
        "elapsed_s",
        "started_s",
    )

    def to_checkpoint(self, identity: dict[str, Any]) -> Checkpoint:
        """identity: settings that must not change until the run is resumed."""
        tensors = {f"model.{name}": tensor.data for name, tensor in trainable(self.model).items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in trainable(self.model).items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {key: getattr(self, key) for key in self._COUNTERS}
        facts |= {"num_averaged": self.average.num_updates, "num_threads": torch.get_num_threads()}
        return Checkpoint(self.step, tensors, {**facts, "identity": identity})

    def load(self, checkpoint: Checkpoint, *, where: Path) -> None:
        """Errors: CheckpointError naming the first tensors that do not fit the model."""
        tensors, parameters = checkpoint.tensors, trainable(self.model)
        _require_fit(tensors, parameters, where)
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"model.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            for key in keys:  # moments lie in memory as their weight does: the fused step relies on it
                saved = tensors[f"optimizer.{key}.{name}"]
                like = torch.empty_like(parameter) if key != "step" else torch.empty((), device=parameter.device)
                self.optimizer.state[parameter][key] = like.copy_(saved)
        self.average.load({name: tensors[f"average.{name}"] for name in parameters}, checkpoint.facts["num_averaged"])
        self.best = {name: tensors[f"best.{name}"].to(self.device) for name in parameters if f"best.{name}" in tensors}
        for key in self._COUNTERS:
            setattr(self, key, checkpoint.facts[key])
        self.step = checkpoint.step
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        if checkpoint.facts["num_threads"] != torch.get_num_threads():
            print(
                f"note: {checkpoint.facts['num_threads']} threads before, {torch.get_num_threads()} now: "
                "the resumed run is not bit for bit the uninterrupted one.",
                file=sys.stderr,
            )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _require_fit(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], where: Path) -> None:
    saved = {name.removeprefix("model."): tuple(t.shape) for name, t in tensors.items() if name.startswith("model.")}
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    wrong = [name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
    if wrong:
        told = "; ".join(
            f"{name}: {saved.get(name, 'absent')}, model {wanted.get(name, 'absent')}" for name in wrong[:5]
        )
        raise CheckpointError(
            f"{len(wrong)} tensors do not fit the model: {told}",
            where=where,
            fix="use the backbone and decoder of the run that wrote it, or start in a new run folder.",
        )
