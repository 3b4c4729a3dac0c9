"""Settings every training shares, whatever it trains."""

from typing import Annotated, Literal

from pydantic import Field

from voxdino.core.records import Record

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Record):
    """How long, how fast, and how careful.

    num_epochs:         passes over the training slices (pictures: images).
    steps_per_epoch:    optimiser steps of an epoch; None: as many as a pass needs, 250 at most.
    time_budget_s:      end by then, everything included; the learning rate anneals to its end within it. Such a run
                        depends on the machine's speed; without a budget it depends on nothing but the settings.
    learning_rate:      peak, for new parts.
    backbone_lr_scale:  multiplies it for pretrained parts that train.
    betas:              decay of AdamW's running mean of gradients and of their squares.
    warmup:             share of the run over which the rate rises.
    schedule:           how the rate falls to 0 after that; "constant": it does not.
    grad_clip:          largest norm of all gradients together.
    ema_decay:          of the running average of weights, which is what is validated and kept.
    amp:                bfloat16 arithmetic; "auto": where the hardware is faster at it.
    patience:           stop after this many validations without a better Dice; None: never.
    checkpoint_every_s: seconds between checkpoints: what a kill can cost.
    """

    num_epochs: int = Field(default=50, ge=1)
    steps_per_epoch: int | None = Field(default=None, ge=1)
    time_budget_s: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1)  # None: the plan's
    learning_rate: float = Field(default=1e-3, gt=0)
    backbone_lr_scale: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    schedule: Literal["cosine", "poly", "linear", "constant"] = "cosine"
    grad_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    amp: Literal["auto", "bf16", "off"] = "auto"
    patience: int | None = Field(default=None, ge=1)
    checkpoint_every_s: float = Field(default=60.0, ge=0)
    num_workers: int = Field(default=2, ge=0)  # threads that read ahead; the result does not depend on it
    seed: int = Field(default=0, ge=0)


FREE_TO_CHANGE = frozenset(
    {"time_budget_s", "checkpoint_every_s", "num_workers"}
)  # between a checkpoint and its resume
