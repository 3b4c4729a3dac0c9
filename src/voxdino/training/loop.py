"""The training loop: batch, prediction, loss, backward, step, record."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from voxdino.core.errors import CheckpointError, DivergedError
from voxdino.models.precision import autocast, uses_bf16
from voxdino.training.checkpoint import CheckpointFolder, require_same
from voxdino.training.config import TrainingConfig
from voxdino.training.losses import Loss
from voxdino.training.optim import WeightAverage, build_optimizer, set_learning_rate
from voxdino.training.schedule import SCHEDULES, learning_rate_factor, progress_of
from voxdino.training.state import TrainingState, trainable
from voxdino.training.stopping import StopRequest
from voxdino.training.tracking import Event, Listener, RunLog, draw_curves

MAX_BAD_STEPS = 3  # in a row
DRAW_EVERY_S = 10.0


class Labelled(Protocol):
    """A batch: whatever the prediction needs, and class indices to compare it with."""

    @property
    def label(self) -> Tensor: ...


@dataclass(frozen=True)
class Validation:
    """Dice on held-back slices, pooled over them. per_class: None where a class is neither there nor predicted."""

    dice: float
    per_class: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what.

    groups:   parameter groups with their learning rates (`Segmenter.parameter_groups`).
    predict:  batch -> logits (B, K, *spatial); must work in training and evaluation mode.
    batches:  first step -> the batches from there on, the same for a step whenever it is asked for.
    validate: computes Dice with the weights as they are; polls the given function and returns None once it says stop.
    identity: settings that a resumed run must share with the one that saved.
    measure:  what `Validation.dice` is here, for people: of classifiers it is no Dice.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    predict: Callable[[Any], Tensor]
    loss: Loss
    batches: Callable[[int], AbstractContextManager[Iterator[Labelled]]]
    validate: Callable[[Callable[[], bool]], Validation | None]
    num_steps: int
    steps_per_epoch: int
    identity: dict[str, Any]
    measure: str = "Dice"


@dataclass(frozen=True)
class Outcome:
    """How a training ended. weights: the best averaged weights, by parameter name."""

    ended_by: Literal["steps", "time", "patience"]
    num_steps: int
    num_skipped: int
    best_dice: float
    best_step: int
    elapsed_s: float
    weights: dict[str, Tensor]


def train(
    job: Job,
    config: TrainingConfig,
    *,
    run_folder: Path,
    device: torch.device,
    stop: StopRequest,
    listen: Listener,
    spent_s: float = 0.0,
    before_s: float = 0.0,
) -> Outcome:
    """Train to the end of the steps, the time budget or the patience; continue from the checkpoint where there is one.

    spent_s:  time this call took before its first step; it counts against the budget.
    before_s: time of earlier stages, which counts as well; a checkpoint has it in it already.

    Errors: StoppedError after a signal (a checkpoint is written first); DivergedError after three steps in a row with
    a loss or gradient that is not finite; CheckpointError for a damaged checkpoint or one of another run.
    """
    optimizer = build_optimizer(job.groups, betas=config.betas)
    parameters = trainable(job.model)
    average = WeightAverage(parameters, config.ema_decay)
    state = TrainingState(job.model, optimizer, average, device, elapsed_s=before_s, started_s=before_s + spent_s)
    checkpoints, log = CheckpointFolder(run_folder / "checkpoint"), RunLog(run_folder / "log.jsonl")
    if (saved := checkpoints.newest()) is not None:
        where = checkpoints.folder / f"step-{saved.step:08d}"
        require_same(saved.facts["identity"], job.identity, where=where)
        state.load(saved, where=where)
        listen(Event("note", f"resumed at step {state.step}"))
    log.rewind(state.step, state.validated_step)

    curve, amp = SCHEDULES[config.schedule], uses_bf16(device, config.amp)
    clock = _Clock(state.elapsed_s + spent_s, config.time_budget_s)
    last_saved, last_drawn = time.monotonic(), -DRAW_EVERY_S

    def save() -> None:
        state.elapsed_s = clock.elapsed_s()
        checkpoints.save(state.to_checkpoint(job.identity))

    def stop_safely() -> None:
        save()
        told = f"at step {state.step} of {job.num_steps}; the checkpoint is written"
        raise stop.error(told, where=run_folder)

    job.model.train()
    with job.batches(state.step) as batches:
        while True:
            progress = progress_of(state.step, job.num_steps, *clock.training_s(state.started_s))
            ended = progress >= 1
            if stop:
                stop_safely()
            if _validation_is_due(state, job, clock, ended=ended):
                if not _validate(state, job, log, clock, stop):
                    stop_safely()
                if ended or time.monotonic() - last_drawn >= DRAW_EVERY_S:
                    draw_curves(log.rows(), run_folder / "curves.png", title=run_folder.name, measure=job.measure)
                    last_drawn = time.monotonic()
                listen(Event("validation", _told(state, log, job.measure), state.step, job.num_steps))
            impatient = config.patience is not None and state.num_stale >= config.patience
            if ended or impatient:
                break
            if time.monotonic() - last_saved >= config.checkpoint_every_s and state.step and not state.num_bad:
                save()
                last_saved, last_drawn = time.monotonic(), -DRAW_EVERY_S

            factor = learning_rate_factor(progress, warmup=config.warmup, curve=curve)
            set_learning_rate(optimizer, factor)
            batch = next(batches)
            with autocast(device, amp):
                logits = job.predict(batch)
            loss = job.loss(logits, batch.label)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.grad_clip, foreach=True)
            loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()  # the step's one wait for the device
            good = abs(loss_value) < float("inf") and norm_value < float("inf")  # false for NaN too
            if good:
                optimizer.step()
                state.average.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            _count(state, good, checkpoints, run_folder)
            log.append(_row(state.step, loss_value, norm_value, factor, good))
            listen(Event("step", f"loss {loss_value:.4f}", state.step, job.num_steps))
    save()
    return Outcome(
        ended_by="patience" if not ended else "steps" if state.step >= job.num_steps else "time",
        num_steps=state.step,
        num_skipped=state.num_skipped,
        best_dice=state.best_dice,
        best_step=state.best_step,
        elapsed_s=clock.elapsed_s(),
        weights=state.best,
    )


class _Clock:
    """Time spent, and the budget less what the last validation and the ending will still need."""

    def __init__(self, spent_s: float, budget_s: float | None) -> None:
        self._start = time.monotonic() - spent_s
        self._limit_s = budget_s
        self.budget_s = budget_s
        self.validation_s = 0.0
        self.validated_at_s = spent_s

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def training_s(self, started_s: float) -> tuple[float, float | None]:
        """Time spent and the budget, both from the first step on: the learning rate's schedule is training's alone."""
        left = None if self.budget_s is None else max(self.budget_s - started_s, 1e-3)
        return self.elapsed_s() - started_s, left

    def validation_took(self, seconds: float) -> None:
        self.validation_s, self.validated_at_s = seconds, self.elapsed_s()
        if self._limit_s is not None:
            self.budget_s = max(self._limit_s - seconds - 3.0, 0.5 * self._limit_s)


def _validation_is_due(state: TrainingState, job: Job, clock: _Clock, *, ended: bool) -> bool:
    """After every epoch and at the end. Under a time budget, validations take a tenth of the time at most."""
    if state.validated_step == state.step or state.step == 0:
        return ended and state.validated_step != state.step
    if clock.budget_s is not None and not ended and clock.elapsed_s() - clock.validated_at_s < 9 * clock.validation_s:
        return False
    return ended or state.step % job.steps_per_epoch == 0


def _validate(state: TrainingState, job: Job, log: RunLog, clock: _Clock, stop: StopRequest) -> bool:
    """Measure the averaged weights and keep them where they are the best; False when a stop came between."""
    started = time.monotonic()
    state.average.swap()
    job.model.eval()
    try:
        result = job.validate(lambda: bool(stop))
    finally:
        job.model.train()
        state.average.swap()
    if result is None:
        return False
    state.validated_step = state.step
    state.num_stale += 1
    if result.dice > state.best_dice:
        state.best = {name: tensor.clone() for name, tensor in state.average.state().items()}
        state.best_dice, state.best_step, state.num_stale = result.dice, state.step, 0
    log.append({"step": state.step, "dice": result.dice, "per_class": result.per_class})
    clock.validation_took(time.monotonic() - started)
    return True


def _told(state: TrainingState, log: RunLog, measure: str) -> str:
    last, best = log.rows()[-1], f"best {state.best_dice:.4f} at step {state.best_step}"
    return f"step {state.step}: validation {measure} {last['dice']:.4f}, {best}"


def _count(state: TrainingState, good: bool, checkpoints: CheckpointFolder, run_folder: Path) -> None:
    state.num_bad = 0 if good else state.num_bad + 1
    state.num_skipped += not good
    if state.num_bad < MAX_BAD_STEPS:
        return
    try:
        saved = checkpoints.newest()
    except CheckpointError:
        saved = None
    kept = f"the checkpoint of step {saved.step} is kept" if saved else "there was no checkpoint yet"
    raise DivergedError(
        f"loss or gradient was not finite {MAX_BAD_STEPS} times in a row, at step {state.step}; {kept}",
        where=run_folder,
        fix="start a new run with a lower learning rate (--set learning_rate=...), or with --set amp=off.",
    )


def _row(step: int, loss: float, norm: float, factor: float, good: bool) -> dict[str, Any]:
    if not good:
        return {"step": step, "loss": None, "skipped": True}
    return {"step": step, "loss": round(loss, 6), "grad_norm": round(norm, 6), "lr_factor": round(factor, 6)}
