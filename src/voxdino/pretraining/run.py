"""A pretraining: a pool of slices and a backbone in; better weights, curves and the record of it out."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from voxdino.core.errors import CheckpointError, DivergedError, PartialError
from voxdino.core.locks import lock_folder
from voxdino.core.safe_files import sweep_temporary
from voxdino.data.loader import ReadAhead
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import uses_bf16
from voxdino.models.weights import load_backbone, write_backbone
from voxdino.models.weights_card import PretrainingFacts, WeightsCard
from voxdino.pretraining.alarms import Alarms
from voxdino.pretraining.checks import fitted, gram_teacher_of, named_weights, require_fit, require_vit
from voxdino.pretraining.config import AnyStage, DistillationStage, PretrainConfig
from voxdino.pretraining.curves import draw_loss_curves, pause_after
from voxdino.pretraining.distil import Distillation
from voxdino.pretraining.learning import Terms
from voxdino.pretraining.pool import Pool
from voxdino.pretraining.provenance import PretrainRecord, PretrainSummary, card_of, identity_of, origin_of, record_of
from voxdino.pretraining.samples import Samples, Slices
from voxdino.pretraining.saving import Saver
from voxdino.pretraining.step import SelfDistillation
from voxdino.pretraining.watch import Probes, Watch
from voxdino.training.checkpoint import read_state, require_same
from voxdino.training.distributed import World, join_world
from voxdino.training.loop import MAX_BAD_STEPS
from voxdino.training.stopping import GO_ON, StopRequest, stop_on_signals
from voxdino.training.tracking import Event, Listener, RunLog, show_progress

TEACHER, CHECKPOINT = "teacher.safetensors", "checkpoint"
SHOWN = ("dino_global", "ibot", "class", "patch")


def pretrain(
    workdir: Path,
    config: PretrainConfig,
    *,
    run_folder: Path,
    device: str = "auto",
    resume: Literal["auto", "require"] = "auto",
    stop_after_s: float | None = None,
    weights_folder: Path | None = None,
    probes: Probes | None = None,
    on_event: Listener | None = None,
) -> PretrainSummary:
    """Run the stages of `config` on the pool of `workdir`, one after the other; the same call continues.

    Under torchrun every process calls this; the first one writes.

    resume:       "require" refuses to start from nothing.
    stop_after_s: leave off at the next step after so long, with a checkpoint (PartialError).
    probes:       labelled data to look at every `watch_every` steps, beside rank and pictures of images of the pool.
    on_event:     told what happens (`tracking.Event`); None shows a progress bar on stderr.

    Writes run.json, teacher.safetensors (a backbone like any other, whole at any moment), checkpoint/, log.jsonl,
    curves.png and pictures/ to `run_folder`; teacher-<step>.safetensors where a stage has an "earlier" Gram teacher.
    Errors: DatasetError without a pool; ConfigError, WeightsError and CheckpointError for what does not fit together;
    ResourceError for the lock, the disk, the device; StoppedError, PartialError; DivergedError.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        world = stack.enter_context(join_world(device))
        if world.is_main:
            stack.enter_context(lock_folder(run_folder))
            sweep_temporary(run_folder)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        world.wait()
        pool = Pool(workdir / "pool")
        backbone, card = load_backbone(config.backbone, weights_folder=weights_folder)
        named = {name: load_backbone(name, weights_folder=weights_folder) for name in named_weights(config)}
        config, told = fitted(config, require_vit(backbone, "backbone").patch_size)
        vit = require_fit(backbone, config, world, {name: one for name, (one, _) in named.items()})
        identity = identity_of(config, pool, card, {name: one.file_digest for name, (_, one) in named.items()})
        path = run_folder / "run.json"
        if path.exists():
            previous = read_state(PretrainRecord, path, fix="delete it: the run then goes on from its checkpoint.")
            if previous.outcome is not None or Saver(run_folder / CHECKPOINT, world).has_checkpoint:
                require_same(previous.identity, identity, where=run_folder)
            if previous.outcome is not None and (run_folder / TEACHER).is_file():  # else it is written again
                return previous.outcome.model_copy(update={"run_folder": str(run_folder), "was_finished": True})
        elif resume == "require":
            raise CheckpointError("there is nothing to resume here", where=run_folder, fix="run without --resume.")
        record = record_of(config, card, pool, vit, world, identity)
        if world.is_main:
            record.write(path)
        stop = stack.enter_context(stop_on_signals())
        listen = stack.enter_context(show_progress(on_event) if world.is_main else nullcontext(_say_nothing))
        for note in told:
            listen(Event("note", note))
        run = _Run(config, run_folder, world, pool, vit, card, named, probes, identity, listen)
        summary = run.go_on(stop, started, stop_after_s)
        if world.is_main:
            ended = summary.model_copy(update={"run_folder": run_folder.name})
            record.model_copy(update={"outcome": ended}).write(path)
        world.wait()
        return summary


class _Run:
    """The loop over all steps of all stages."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        world: World,
        pool: Pool,
        backbone: ViT,
        card: WeightsCard,
        named: Mapping[str, tuple[Backbone, WeightsCard]],
        probes: Probes | None,
        identity: dict[str, Any],
        listen: Listener,
    ) -> None:
        self.config, self.folder, self.world, self.pool = config, folder, world, pool
        self.backbone, self.card, self.named, self.listen = backbone, card, named, listen
        self.identity = {**identity, "processes": world.size}
        self.patch_size = backbone.patch_size
        self.samples = Samples(pool, config, world)
        self.task: SelfDistillation | Distillation | None = None
        self.saver = Saver(folder / CHECKPOINT, world)
        self.log = RunLog(folder / "log.jsonl")
        alarms = Alarms({"class": config.dino_head.num_prototypes, "patch": config.ibot_head.num_prototypes})
        self.watch = Watch(pool, backbone.patch_size, probes or Probes(), alarms)
        self.num_steps = sum(stage.num_steps for stage in config.stages)
        found = (gram_teacher_of(config.stages, stage) for stage in config.stages)
        self.moments = {teacher.step for teacher in found if teacher is not None}
        self.step, self.num_skipped, self.num_bad, self.elapsed_s, self.waited_s = 0, 0, 0, 0.0, 0.0

    def go_on(self, stop: StopRequest, started: float, stop_after_s: float | None) -> PretrainSummary:
        """To the end of the last stage, from where the newest checkpoint was written."""
        self._resume()
        before, last_saved, next_drawn = self.elapsed_s, time.monotonic(), 0.0
        assert self.task is not None
        if self.config.watch_every and self.step == 0:
            self._look()
        with ReadAhead(
            self._slices,
            first=self.step,
            num_threads=self.config.num_workers,
            size_of=lambda slices: slices.num_bytes,
        ) as batches:
            while self.step < self.num_steps:
                self.elapsed_s = before + time.monotonic() - started
                late = stop_after_s is not None and time.monotonic() - started > stop_after_s
                if self.world.any(bool(stop) or late):
                    self._leave(stop)
                stage, done, _ = self._place(self.step)
                if done == 0 and self.step:
                    self._begin(stage)
                asked = time.monotonic()
                slices = next(batches)
                self.waited_s += time.monotonic() - asked
                terms = self.task.step(self.samples.portions(slices, stage, done, self.patch_size), done)
                self.step += 1
                self._tell(stage, terms)
                if self.step in self.moments:
                    self._write_teacher(self._put_aside(self.step))
                every = self.config.watch_every
                if every and (self.step % every == 0 or self.step == self.num_steps):
                    self._look()
                now = time.monotonic()
                if self.world.any(now - last_saved >= self.config.checkpoint_every_s) and not self.num_bad:
                    self.elapsed_s = before + now - started
                    self._save()
                    last_saved = time.monotonic()
                if (began := time.monotonic()) >= next_drawn:
                    self._draw()
                    next_drawn = time.monotonic() + pause_after(time.monotonic() - began)
        self.elapsed_s = before + time.monotonic() - started
        self._save()
        self._draw()
        spent = max(time.monotonic() - started, 1e-9)
        return PretrainSummary(
            run_folder=str(self.folder),
            num_steps=self.step,
            num_skipped=self.num_skipped,
            elapsed_s=round(self.elapsed_s, 1),
            data_wait=round(self.waited_s / spent, 4),
        )

    def _place(self, step: int) -> tuple[AnyStage, int, int]:
        """The stage of a step of the run, the step's number in it, and that of its first image in the run."""
        first = 0
        for stage in self.config.stages:
            if step < stage.num_steps:
                return stage, step, first + step * stage.batch_size
            step -= stage.num_steps
            first += stage.num_steps * stage.batch_size
        raise AssertionError("beyond the last step")

    def _slices(self, step: int) -> Slices:
        """Of a step of the run; what is read ahead beyond the last one is never used."""
        stage, _, first_image = self._place(min(step, self.num_steps - 1))
        return self.samples.slices(stage, first_image)

    def _begin(self, stage: AnyStage) -> None:
        """From the backbone that the stage before has made."""
        self.listen(Event("note", f"stage {stage.name}: {stage.num_steps} steps of {stage.batch_size} images"))
        if isinstance(stage, DistillationStage):
            teachers = [self.named[name][0] for name in stage.teachers]
            self.task = Distillation(self.config, stage, self._result(), teachers, self.world)
            return
        if not isinstance(self.task, SelfDistillation):
            self.task = SelfDistillation(self.config, self._result(), self.world)
        self.task.begin(stage, self._anchor(stage))

    def _anchor(self, stage: AnyStage) -> ViT | None:
        """The Gram teacher of a stage, where it is not the backbone that the stage starts from."""
        teacher = gram_teacher_of(self.config.stages, stage)
        if teacher is None or (teacher.weights is None and teacher.step is None):
            return None
        if teacher.step is not None:
            return require_vit(load_backbone(self._put_aside(teacher.step))[0], "gram_teacher")
        return copy.deepcopy(require_vit(self.named[str(teacher.weights)][0], "gram_teacher"))

    def _put_aside(self, step: int) -> Path:
        """The teacher as it was then, kept for a later stage."""
        return self.folder / f"teacher-{step:08d}.safetensors"

    def _result(self) -> ViT:
        """The backbone as the run has made it, whole in every process; at first the one it starts from."""
        if self.task is None:
            return self.backbone
        vit = ViT(self.task.result.config)
        vit.load_state_dict(self._result_state())
        return vit.to(self.world.device)

    def _resume(self) -> None:
        facts = self.saver.facts()
        if facts is None:
            self._begin(self.config.stages[0])
            if self.world.is_main:
                self.log.rewind(-1, -1)
            return
        require_same(facts["identity"], self.identity, where=self.saver.folder)
        self.step, self.num_skipped, self.num_bad = facts["step"], facts["num_skipped"], facts["num_bad"]
        self.elapsed_s = facts["elapsed_s"]
        self.watch.alarms.load_state(facts["alarms"])
        self._begin(self._place(max(self.step - 1, 0))[0])  # the stage whose optimiser was saved
        assert self.task is not None
        self.saver.load(self.task)
        if self.world.is_main:
            self.log.rewind(self.step, -1)
        threads, before = torch.get_num_threads(), facts["num_threads"]
        other = "" if threads == before else f"; {before} threads before, {threads} now: not bit for bit the same"
        was, now = facts.get("computed"), self._computed
        other += "" if was in (None, now) else f"; on {was} before, on {now} now: not the same numbers"
        self.listen(Event("note", f"resumed at step {self.step}{other}"))

    def _save(self) -> None:
        assert self.task is not None
        facts = {
            "identity": self.identity,
            "num_skipped": self.num_skipped,
            "num_bad": self.num_bad,
            "num_threads": torch.get_num_threads(),
            "computed": self._computed,
            "elapsed_s": self.elapsed_s,
            "alarms": self.watch.alarms.state(),
        }
        self.saver.save(self.step, self.task.state(), facts)
        self._write_teacher(self.folder / TEACHER)

    def _leave(self, stop: StopRequest) -> None:
        self._save()
        told = f"at step {self.step} of {self.num_steps}; the checkpoint is written"
        if not stop:
            raise PartialError(f"left off in time {told}", where=self.folder, fix=GO_ON)
        raise stop.error(told, where=self.folder)

    def _tell(self, stage: AnyStage, terms: Terms) -> None:
        skipped = bool(terms.pop("skipped"))
        self.num_bad = self.num_bad + 1 if skipped else 0
        self.num_skipped += skipped
        finite = {name: round(value, 6) if abs(value) < float("inf") else None for name, value in terms.items()}
        if self.world.is_main:
            self.log.append(
                {"step": self.step, "stage": stage.name, **finite, **({"skipped": True} if skipped else {})}
            )
            self._warn(self.watch.judge(self.step, terms))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in terms.items() if name in SHOWN)
            self.listen(Event("step", f"{stage.name}: {shown}", self.step, self.num_steps))
        if self.num_bad >= MAX_BAD_STEPS:
            raise DivergedError(
                f"loss or gradient was not finite {MAX_BAD_STEPS} times in a row, at step {self.step}; "
                "checkpoint and teacher are those from before",
                where=self.folder,
                fix="start a new run with a lower learning rate, or with --set precision=off.",
            )

    @property
    def _computed(self) -> str:
        """With what, e.g. "cuda in bfloat16"."""
        bf16 = uses_bf16(self.world.device, self.config.precision)
        return f"{self.world.device.type} in {'bfloat16' if bf16 else 'float32'}"

    def _look(self) -> None:
        """At fixed images, with the teacher as it is now."""
        backbone = self._result().eval().requires_grad_(False)
        if self.world.is_main:
            bf16 = uses_bf16(self.world.device, self.config.precision)
            row = self.watch.look(backbone, self.step, self.folder / "pictures", self.world.device, bf16)
            known = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self.log.append({"step": self.step, "watch": known})
            told = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
            self.listen(Event("note", f"step {self.step}: {told}"))
            self._warn(self.watch.judge_look(self.step, row))
        self.world.wait()

    def _warn(self, messages: Sequence[str]) -> None:
        for message in messages:
            self.log.append({"step": self.step, "alarm": message})
            self.listen(Event("note", message))

    def _result_state(self) -> dict[str, Tensor]:
        assert self.task is not None
        state: Mapping[str, Any] = self.task.result.state_dict()
        return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}

    def _write_teacher(self, path: Path) -> None:
        assert self.task is not None
        tensors = self._result_state()
        if self.world.is_main:
            facts = self._origin.model_copy(update={"num_steps": self.step})
            card = card_of(self.folder.name, self.task.result, self.card, self._teacher_cards, facts)
            write_backbone(path, tensors, card)
        self.world.wait()

    @cached_property
    def _origin(self) -> PretrainingFacts:
        return origin_of(self.config, self.pool, self.card, self._teacher_cards)

    @property
    def _teacher_cards(self) -> list[WeightsCard]:
        return [card for _, card in self.named.values()]

    def _draw(self) -> None:
        if self.world.is_main:
            draw_loss_curves(self.log.rows(), self.folder / "curves.png", title=self.folder.name)


def _say_nothing(_: Event) -> None:
    pass
