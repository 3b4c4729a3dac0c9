"""A pretraining: a pool of slices and a backbone in; better weights, curves and the record of it out."""

import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import voxdino
from voxdino.core.errors import CheckpointError, ConfigError, DivergedError, PartialError, StoppedError
from voxdino.core.records import Record
from voxdino.core.safe_files import lock_folder, sweep_temporary
from voxdino.data.loader import ReadAhead
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.vit import ViT
from voxdino.models.weights import PretrainingFacts, WeightsCard, load_backbone, pack_seen, write_backbone
from voxdino.pretraining.config import AnyStage, DistillationStage, PretrainConfig
from voxdino.pretraining.curves import draw_loss_curves
from voxdino.pretraining.distil import Distillation
from voxdino.pretraining.pool import Pool
from voxdino.pretraining.samples import Samples, Slices
from voxdino.pretraining.saving import Saver
from voxdino.pretraining.step import SelfDistillation, Terms
from voxdino.pretraining.watch import Probes, Watch
from voxdino.training.checkpoint import flatten, read_state, require_same
from voxdino.training.distributed import World, join_world
from voxdino.training.stopping import StopRequest, stop_on_signals
from voxdino.training.tracking import Event, Listener, RunLog, show_progress

TEACHER = "teacher.safetensors"
MAX_BAD_STEPS = 3  # in a row
DRAW_EVERY_S = 30.0
SHOWN = ("dino_global", "ibot", "class", "patch")
FREE_TO_CHANGE = frozenset({"checkpoint_every_s", "num_workers", "compile", "gradient_checkpointing", "watch_every"})


class PretrainSummary(Record):
    """How a pretraining ended, or was left.

    num_steps:    of all stages, done until now; num_skipped: of them, those whose loss or gradient was no number.
    data_wait:    share of this call's time in which the device waited for images.
    was_finished: it had ended before; nothing was done now.
    """

    run_folder: str
    num_steps: int
    num_skipped: int
    elapsed_s: float
    data_wait: float
    was_finished: bool = False


class PretrainRecord(Record):
    """run.json: what was done, with what. No absolute path, no host name: runs are shared.

    identity: what must not change between the parts of the run, flat. outcome: None while the run has not ended.
    """

    config: dict[str, Any]
    backbone: dict[str, str | None]
    pool: dict[str, Any]
    num_parameters: int
    device: str
    num_processes: int
    num_threads: int
    python: str
    identity: dict[str, Any]
    outcome: PretrainSummary | None = None


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
    curves.png and pictures/ to `run_folder`.
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
        named = {name: load_backbone(name, weights_folder=weights_folder) for name in _named_weights(config)}
        vit = _require_fit(backbone, config, world, {name: one for name, (one, _) in named.items()})
        identity = _identity(config, pool, card, {name: one.file_digest for name, (_, one) in named.items()})
        path = run_folder / "run.json"
        if path.exists():
            previous = read_state(PretrainRecord, path, fix="delete it: the run then goes on from its checkpoint.")
            require_same(previous.identity, identity, where=run_folder)
            if previous.outcome is not None:
                return previous.outcome.model_copy(update={"run_folder": str(run_folder), "was_finished": True})
        elif resume == "require":
            raise CheckpointError("there is nothing to resume here", where=run_folder, fix="run without --resume.")
        record = _record(config, card, pool, vit, world, identity)
        if world.is_main:
            record.write(path)
        stop = stack.enter_context(stop_on_signals())
        listen = stack.enter_context(show_progress(on_event) if world.is_main else nullcontext(_say_nothing))
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
        self.saver = Saver(folder / "checkpoint", world)
        self.log = RunLog(folder / "log.jsonl")
        self.watch = Watch.of_pool(pool, backbone.patch_size, config.dino_head.num_prototypes, probes)
        self.num_steps = sum(stage.num_steps for stage in config.stages)
        self.step, self.num_skipped, self.num_bad, self.elapsed_s, self.waited_s = 0, 0, 0, 0.0, 0.0

    def go_on(self, stop: StopRequest, started: float, stop_after_s: float | None) -> PretrainSummary:
        """To the end of the last stage, from where the newest checkpoint was written."""
        self._resume()
        before, last_saved, last_drawn = self.elapsed_s, time.monotonic(), -DRAW_EVERY_S
        assert self.task is not None
        if self.config.watch_every and self.step == 0:
            self._look()
        with ReadAhead(self._slices, first=self.step, num_threads=self.config.num_workers) as batches:
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
                every = self.config.watch_every
                if every and (self.step % every == 0 or self.step == self.num_steps):
                    self._look()
                now = time.monotonic()
                if self.world.any(now - last_saved >= self.config.checkpoint_every_s) and not self.num_bad:
                    self.elapsed_s = before + now - started
                    self._save()
                    last_saved = time.monotonic()
                if now - last_drawn >= DRAW_EVERY_S:
                    self._draw()
                    last_drawn = time.monotonic()
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
        anchor = self.named.get(_gram_teacher(self.config.stages, stage))
        self.task.begin(stage, None if anchor is None else copy.deepcopy(_require_vit(anchor[0], "gram_teacher")))

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
                self.log.rewind(0, -1)
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
        self.listen(Event("note", f"resumed at step {self.step}{other}"))

    def _save(self) -> None:
        assert self.task is not None
        facts = {
            "identity": self.identity,
            "num_skipped": self.num_skipped,
            "num_bad": self.num_bad,
            "num_threads": torch.get_num_threads(),
            "elapsed_s": self.elapsed_s,
            "alarms": self.watch.alarms.state(),
        }
        self.saver.save(self.step, self.task.state(), facts)
        self._write_teacher()

    def _leave(self, stop: StopRequest) -> None:
        self._save()
        fix = "the same command goes on from there."
        told = f"at step {self.step} of {self.num_steps}; the checkpoint is written"
        if not stop:
            raise PartialError(f"left off in time {told}", where=self.folder, fix=fix)
        number = stop.signal_number or 2
        raise StoppedError(f"stopped by signal {number} {told}", signal_number=number, where=str(self.folder), fix=fix)

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

    def _look(self) -> None:
        """At fixed images, with the teacher as it is now."""
        backbone = self._result().eval().requires_grad_(False)
        if self.world.is_main:
            row = self.watch.look(backbone, self.step, self.folder / "pictures", self.world.device)
            self.log.append({"step": self.step, "watch": row})
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

    def _write_teacher(self) -> None:
        assert self.task is not None
        tensors = self._result_state()
        if not self.world.is_main:
            return
        start = self.card
        facts = self._origin.model_copy(update={"num_steps": self.step})
        card = start.model_copy(
            update={
                "name": self.folder.name,
                "layout": "voxdino",
                "licence": _licence_of([start, *(card for _, card in self.named.values())]),
                "source": f"pretrained by voxdino {voxdino.__version__} from {start.name}",
                "file_digest": "",
                "source_digest": start.file_digest,
                "config": self.task.result.config,
                "notes": (),
                "model": None,
                "pretraining": facts,
                "licence_shown": True,
            }
        )
        write_backbone(self.folder / TEACHER, tensors, card)

    @cached_property
    def _origin(self) -> PretrainingFacts:
        """All but the number of steps. What start and teachers have seen, this backbone has seen too."""
        earlier = [card.pretraining for card in (self.card, *(card for _, card in self.named.values()))]
        known = [facts for facts in earlier if facts is not None]
        sources = {name: counts for facts in known for name, counts in facts.sources.items()}
        return PretrainingFacts(
            recipe=self.config.recipe,
            start=self.card.name,
            teachers=tuple(card.name for _, card in self.named.values()),
            num_steps=0,
            pool_digest=self.pool.digest(),
            sources={**sources, **self.pool.sources()},
            seen=pack_seen(self.pool.digests(), (facts.seen for facts in known)),
        )

    def _draw(self) -> None:
        if self.world.is_main:
            draw_loss_curves(self.log.rows(), self.folder / "curves.png", title=self.folder.name)


def _named_weights(config: PretrainConfig) -> list[str]:
    """Of all teachers and Gram teachers, each once."""
    names = [
        *(name for stage in config.stages if isinstance(stage, DistillationStage) for name in stage.teachers),
        *(_gram_teacher(config.stages, stage) for stage in config.stages),
    ]
    return [name for name in dict.fromkeys(names) if name not in ("", "start")]


def _gram_teacher(stages: Sequence[AnyStage], stage: AnyStage) -> str:
    """Whose similarities a stage keeps: "start", or weights; "" where it keeps none."""
    if isinstance(stage, DistillationStage) or not stage.has_gram:
        return ""
    if stage.gram_teacher != "kept":
        return stage.gram_teacher
    before = stages[: next(place for place, one in enumerate(stages) if one is stage)]
    return (_gram_teacher(before, before[-1]) if before else "") or "start"


def _licence_of(cards: Sequence[WeightsCard]) -> str:
    """All that is inherited; random weights have none."""
    given = dict.fromkeys(card.licence for card in cards if not card.licence.startswith("none"))
    return "; ".join(given) or cards[0].licence


def _require_fit(backbone: Any, config: PretrainConfig, world: World, named: Mapping[str, Backbone]) -> ViT:
    """Errors: ConfigError for what cannot be pretrained so."""
    vit = _require_vit(backbone, "backbone")
    for stage in config.stages:
        if stage.batch_size % (world.size * stage.accumulate):
            raise ConfigError(
                f"stage {stage.name}: batches of {stage.batch_size} images cannot be shared out evenly to {world.size} "
                f"processes in {stage.accumulate} portions",
                fix=f"give a multiple of {world.size * stage.accumulate}.",
            )
        for size in stage.resolutions:
            sides = [size.global_size, size.local_size]
            if size.gram_size is not None and _gram_teacher(config.stages, stage):
                sides.append(size.gram_size)
                if size.gram_size < size.global_size:
                    told = f"stage {stage.name}: the Gram teacher's crops of {size.gram_size} px"
                    fix = "give at least as many, or null."
                    raise ConfigError(f"{told} are smaller than the student's of {size.global_size}", fix=fix)
            wrong = [side for side in sides if side % vit.patch_size]
            if wrong:
                fix = f"give multiples of its patch of {vit.patch_size}."
                raise ConfigError(f"stage {stage.name}: crops of {wrong[0]} px do not fit the backbone", fix=fix)
        anchor = named.get(_gram_teacher(config.stages, stage))
        if anchor is not None and _require_vit(anchor, "gram_teacher").config != vit.config:
            fix = "give one that this backbone has been, at another time."
            raise ConfigError("is of another architecture than the backbone", where="gram_teacher", fix=fix)
    return vit


def _require_vit(backbone: Any, where: str) -> ViT:
    if not isinstance(backbone, ViT):
        fix = "choose a DINOv3 or DINOv2 backbone (voxdino list backbones)."
        raise ConfigError("is no vision transformer: its patches cannot be masked", where=where, fix=fix)
    return backbone


def _identity(config: PretrainConfig, pool: Pool, card: WeightsCard, named: Mapping[str, str]) -> dict[str, Any]:
    """What must not change between the parts of one run, flat; weights count by their content, wherever they lie."""
    other = {*FREE_TO_CHANGE, "backbone", "stages"}
    settings = {key: value for key, value in config.to_json().items() if key not in other}
    stages = {
        f"{number} {stage.name}": _named(stage, named.__getitem__) for number, stage in enumerate(config.stages, 1)
    }
    return flatten(
        {
            **settings,
            "stages": stages,
            "backbone": card.file_digest,
            "pool": pool.digest(),
            "voxdino": voxdino.__version__,
            "torch": str(torch.__version__),
        }
    )


def _named(stage: AnyStage, name: Callable[[str], str]) -> dict[str, Any]:
    """A stage as JSON, the weights it names told by `name`: paths are of one machine."""
    told: dict[str, Any] = stage.to_json()
    if "teachers" in told:
        told["teachers"] = [name(teacher) for teacher in told["teachers"]]
    if told.get("gram_teacher") not in (None, "start", "kept"):
        told["gram_teacher"] = name(told["gram_teacher"])
    return told


def _record(
    config: PretrainConfig, card: WeightsCard, pool: Pool, backbone: ViT, world: World, identity: dict[str, Any]
) -> PretrainRecord:
    return PretrainRecord(
        config={
            **config.to_json(),
            "backbone": Path(config.backbone).name,
            "stages": [_named(stage, lambda name: Path(name).name) for stage in config.stages],
        },
        backbone={"name": card.name, "licence": card.licence, "digest": card.file_digest},
        pool={"digest": pool.digest(), "num_slices": len(pool), "sources": pool.sources()},
        num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        device=world.device.type,
        num_processes=world.size,
        num_threads=torch.get_num_threads(),
        python=platform.python_version(),
        identity=identity,
    )


def _say_nothing(_: Event) -> None:
    pass
