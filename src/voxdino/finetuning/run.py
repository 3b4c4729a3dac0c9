"""One fine-tuning run: prepared cases and a backbone in, a folder with model, curves and the record of it out."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import voxdino
from voxdino.core.errors import CheckpointError, ConfigError, DatasetError, PlanError
from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_file, sweep_temporary
from voxdino.data.store import IGNORED, PREPARE_AGAIN, CaseStore
from voxdino.finetuning.config import FinetuneConfig
from voxdino.finetuning.examples import CachedExamples, ImageExamples, Setting
from voxdino.finetuning.model import effective_plan, model_config, new_segmenter
from voxdino.finetuning.validation import validate
from voxdino.inference.load import load_model, save_model
from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.build import build_backbone
from voxdino.models.backbones.vit import ViT
from voxdino.models.compose import build_segmenter
from voxdino.models.initial import InitialReport, load_initial
from voxdino.models.lora import merge_lora
from voxdino.models.precision import autocast, resolve_device
from voxdino.models.segmenter import Segmenter
from voxdino.models.weights import load_backbone
from voxdino.models.weights_card import WeightsCard
from voxdino.preparation.plan import Plan
from voxdino.preparation.splits import Split, read_split
from voxdino.training.checkpoint import flatten, read_state, require_same
from voxdino.training.config import FREE_TO_CHANGE
from voxdino.training.loop import Job, Outcome, train
from voxdino.training.losses import Loss, choose_loss
from voxdino.training.state import trainable
from voxdino.training.stopping import StopRequest, stop_on_signals
from voxdino.training.tracking import Event, Listener, show_progress

MAX_EPOCH_STEPS = 250
SHARED_BY_STAGES = ("backbone", "seed", "num_train_cases", "num_workers", "amp", "checkpoint_every_s")


class RunSummary(Record):
    """How a run ended.

    ended_by:      "steps", "time" (the budget) or "patience".
    best_dice:     of the validation slices, pooled, at prepared resolution; `evaluate` gives the real figure.
    was_finished:  the run had ended before; nothing was done now.
    """

    run_folder: str
    ended_by: str
    num_steps: int
    num_skipped: int
    best_dice: float
    best_step: int
    elapsed_s: float
    was_finished: bool = False


class RunRecord(Record):
    """run.json: what was done, with what. No absolute path, no host name: runs are shared.

    num_parameters: "trained" and "all".
    pretrained_on:  held-back cases that the backbone's pretraining has seen: their scores are not of unseen images.
    identity:       what must not change between the parts of the run, flat.
    outcome:        None while the run has not ended.
    """

    config: dict[str, Any]
    fold: int
    split: Split
    backbone: dict[str, str | None]
    num_parameters: dict[str, int]
    pretrained_on: tuple[str, ...] = ()
    device: str
    num_threads: int
    python: str
    identity: dict[str, Any]
    outcome: RunSummary | None = None


def finetune(
    workdir: Path,
    config: FinetuneConfig,
    *,
    run_folder: Path,
    fold: int = 0,
    device: str = "auto",
    resume: Literal["auto", "require"] = "auto",
    weights_folder: Path | None = None,
    on_event: Listener | None = None,
) -> RunSummary:
    """Fine-tune on fold `fold` of the prepared cases in `workdir`; the same call continues what was interrupted.

    A config with a `first` stage runs that one before, in `stage1/` of the run folder, and starts from its backbone.

    resume:   "require" refuses to start from nothing.
    on_event: told what happens (`tracking.Event`); None shows a progress bar on stderr.

    Writes run.json, plan.json, model.json, model.safetensors, checkpoint/, log.jsonl and curves.png to `run_folder`.
    Errors: PlanError, ConfigError, DatasetError, WeightsError and CheckpointError for what does not fit together;
    ResourceError for the lock, the disk, the device; StoppedError; DivergedError.
    """
    started = time.monotonic()
    stage, before_s = None, 0.0
    if config.first is not None:
        stage, first = run_folder / "stage1", _first_stage(config, config.first)
        if resume == "require" and not (stage / "run.json").exists():
            raise _nothing_to_resume(run_folder)
        if not (stage / "run.json").exists():
            card = load_backbone(config.backbone, weights_folder=weights_folder)[1]
            require_buildable(config, Plan.read(workdir / "plan.json"), card, device)
        done = finetune(
            workdir,
            first,
            run_folder=stage,
            fold=fold,
            device=device,
            weights_folder=weights_folder,
            on_event=on_event,
        )
        before_s = max(0.0, done.elapsed_s - (time.monotonic() - started))  # what earlier calls spent on it
    with lock_folder(run_folder), torch.random.fork_rng(devices=[]):
        sweep_temporary(run_folder)
        plan = effective_plan(config, Plan.read(workdir / "plan.json"))
        loss = choose_loss(config.loss, plan.labels, ignore_index=IGNORED, spacing=plan.voxel_size)  # refused early
        split = _drawn(read_split(workdir / "splits.json", fold), config)
        target = resolve_device(device)
        torch.manual_seed(config.seed)
        backbone, card = _backbone(config, stage, weights_folder)
        if backbone.depth and backbone.patch_size != plan.patch_size:
            raise PlanError(
                f"the plan is for tokens of {plan.patch_size} pixels, those of {card.name} have {backbone.patch_size}",
                where=workdir / "plan.json",
                fix=f"voxdino prepare DATASET --workdir {workdir} --backbone {config.backbone}",
            )
        store = _store_of(workdir, plan, split)
        segmenter = new_segmenter(config, plan, backbone, card, target)
        initial = None
        if config.initial_weights is not None:
            initial = load_initial(segmenter, config.initial_weights, weights_folder=weights_folder)
            if initial.licence not in (None, card.licence):
                card = card.model_copy(update={"licence": f"{card.licence}; {initial.licence}"})
        identity = _identity(workdir, config, plan, split, card, initial)
        if (path := run_folder / "run.json").exists():
            previous = read_state(RunRecord, path, fix="delete it: the run then goes on from its checkpoint.")
            require_same(previous.identity, identity, where=run_folder)
            if previous.outcome is not None:
                return previous.outcome.model_copy(update={"run_folder": str(run_folder), "was_finished": True})
        elif resume == "require":
            raise _nothing_to_resume(run_folder)

        seen_before = _pretrained_on(store, split, card)
        record = _record(config, split, fold, card, segmenter, target, identity, seen_before)
        record.write(path)
        plan.write(run_folder / "plan.json")
        setting = Setting(
            store=store,
            plan=plan,
            config=config,
            segmenter=segmenter,
            device=target,
            train_ids=split.train,
            val_ids=split.val,
            batch_size=plan.batch_size,
        )
        with stop_on_signals() as stop, show_progress(on_event) as listen:
            for line in initial.told() if initial else ():
                listen(Event("note", line))
            if seen_before:
                told = f"{len(seen_before)} of {len(split.val)} held-back cases (first: {seen_before[0]})"
                fix = "leave them out: voxdino pool --leave-out PATTERN"
                listen(Event("note", f"{told} were in the pool that {card.name} was pretrained on; {fix}"))
            seen = card.file_digest + (initial.digest if initial and initial.backbone_changed else "")
            examples = _examples(setting, seen, workdir / "features", run_folder, stop, listen, started)
            if stop:
                raise stop.error("while caching features", where=run_folder)
            torch.manual_seed(config.seed + 1)  # the same start whether features were cached now or before
            outcome = train(
                _job(setting, examples, loss, identity),
                config,
                run_folder=run_folder,
                device=target,
                stop=stop,
                listen=listen,
                spent_s=time.monotonic() - started,
                before_s=before_s,
            )
        _take_best(segmenter, outcome)
        save_model(run_folder, segmenter, plan, card)
        summary = _summary(outcome, run_folder)
        ended = summary.model_copy(update={"run_folder": run_folder.name})
        record.model_copy(update={"outcome": ended}).write(path)
        return summary


def _first_stage(config: FinetuneConfig, first: FinetuneConfig) -> FinetuneConfig:
    """The settings of the stage before, with those that both share. Errors: ConfigError."""
    if config.initial_weights is not None:
        fix = "say first.initial_weights: the second stage starts from what the first has made of them."
        raise ConfigError("initial_weights would replace the backbone that the first stage adapts", fix=fix)
    if first.depth_adapter:
        fix = "set first.depth_adapter to 0; the second stage has adapters of its own (depth_adapter)."
        raise ConfigError("depth adapters of the first stage would not outlast it", fix=fix)
    shared = {name: getattr(config, name) for name in SHARED_BY_STAGES}
    if config.time_budget_s is not None:
        shared["time_budget_s"] = config.first_time_share * config.time_budget_s
    return first.model_copy(update=shared)


def require_buildable(config: FinetuneConfig, plan: Plan, card: WeightsCard, device: str) -> None:
    """Put the models of all stages together, without weights, before anything takes its time.

    Errors: ConfigError for what does not go together.
    """
    for stage in (config, *([] if config.first is None else [_first_stage(config, config.first)])):
        settings = model_config(stage, effective_plan(stage, plan), card.licence, resolve_device(device))
        with torch.device("meta"):
            build_segmenter(settings, build_backbone(card.config))


def _nothing_to_resume(run_folder: Path) -> CheckpointError:
    return CheckpointError("there is nothing to resume here", where=run_folder, fix="run without --resume.")


def _store_of(workdir: Path, plan: Plan, split: Split) -> CaseStore:
    """The prepared cases. Errors: DatasetError where one was prepared by another plan than the one beside it."""
    store, digest = CaseStore(workdir / "prepared"), plan.preparation_digest()
    for case in (*split.train, *split.val):
        if store.record(case).preparation_digest != digest:
            raise DatasetError(f"case {case!r} was prepared by another plan", where=workdir, fix=PREPARE_AGAIN)
    return store


def _drawn(split: Split, config: FinetuneConfig) -> Split:
    """The split with `num_train_cases` of its training cases; more cases hold the fewer of the same seed."""
    if config.num_train_cases is None:
        return split
    order = np.random.default_rng([config.seed, 10]).permutation(len(split.train))
    chosen = {split.train[place] for place in order[: config.num_train_cases]}
    return split.model_copy(update={"train": tuple(case for case in split.train if case in chosen)})


def _backbone(config: FinetuneConfig, stage: Path | None, weights_folder: Path | None) -> tuple[Backbone, WeightsCard]:
    """The configured backbone; after a first stage the one it adapted, adapters merged, with the card it came with."""
    if stage is None:
        return load_backbone(config.backbone, weights_folder=weights_folder)
    model = load_model(stage)
    if isinstance(model.segmenter.backbone, ViT):
        merge_lora(model.segmenter.backbone)
    name = f"{model.card.backbone.name}, adapted"
    return model.segmenter.backbone, model.card.backbone.model_copy(update={"name": name, "file_digest": model.digest})


def _examples(
    setting: Setting,
    weights_digest: str,
    features_folder: Path,
    run_folder: Path,
    stop: StopRequest,
    listen: Listener,
    started: float,
) -> CachedExamples | ImageExamples:
    """Cached features where the backbone is frozen, images where it is not."""
    config = setting.config
    if config.cache == "on" and not setting.segmenter.cacheable:
        raise ConfigError(
            "features cannot be cached while the backbone or the input projection trains",
            where="cache",
            fix="--set cache=auto, or --set adaptation=frozen.",
        )
    if config.cache == "off" or not setting.segmenter.cacheable:
        return ImageExamples(setting)

    def seconds_left() -> float:
        if config.time_budget_s is None:
            return float("inf")
        return config.cache_time_share * config.time_budget_s - (time.monotonic() - started)

    return CachedExamples(
        setting,
        weights_digest=weights_digest,
        features_folder=features_folder,
        run_folder=run_folder,
        stop=stop,
        listen=listen,
        seconds_left=seconds_left,
    )


def _job(setting: Setting, examples: CachedExamples | ImageExamples, loss: Loss, identity: dict[str, Any]) -> Job:
    config, labels = setting.config, setting.plan.labels
    steps_per_epoch = config.steps_per_epoch or min(MAX_EPOCH_STEPS, -(-examples.num_samples // setting.batch_size))

    def measure(stop: Callable[[], bool]) -> Any:
        def predict(batch: Any) -> Tensor:
            with autocast(setting.device, setting.amp):
                return examples.predict(batch)

        return validate(examples.validation_batches(), predict, labels, ignore_index=IGNORED, stop=stop)

    return Job(
        model=setting.segmenter,
        groups=setting.segmenter.parameter_groups(
            config.learning_rate, backbone_lr_scale=config.backbone_lr_scale, weight_decay=config.weight_decay
        ),
        predict=examples.predict,
        loss=loss,
        batches=lambda first: examples.batches(first, steps_per_epoch),
        validate=measure,
        num_steps=config.num_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        identity=identity,
    )


def _identity(
    workdir: Path,
    config: FinetuneConfig,
    plan: Plan,
    split: Split,
    card: WeightsCard,
    initial: InitialReport | None,
) -> dict[str, Any]:
    """What must not change between the parts of one run, flat; weights count by their content, wherever they lie."""
    other = {*FREE_TO_CHANGE, "backbone", "initial_weights"}
    settings = {key: value for key, value in config.to_json().items() if key not in other}
    return flatten(
        {
            **settings,
            "backbone": card.file_digest,
            "initial_weights": None if initial is None else initial.digest,
            "plan": plan.digest(),
            "split": split.digest(),
            "prepared": digest_file(workdir / "prepared" / "manifest.json"),
            "voxdino": voxdino.__version__,
            "torch": str(torch.__version__),
        }
    )


def _pretrained_on(store: CaseStore, split: Split, card: WeightsCard) -> tuple[str, ...]:
    """Held-back cases of which a file was in the pool of the backbone's pretraining, bit by bit the same."""
    if card.pretraining is None:
        return ()
    holds = card.pretraining.holds
    return tuple(case for case in split.val if any(map(holds, store.record(case).source_digests.values())))


def _record(
    config: FinetuneConfig,
    split: Split,
    fold: int,
    card: WeightsCard,
    segmenter: Segmenter,
    device: torch.device,
    identity: dict[str, Any],
    pretrained_on: tuple[str, ...],
) -> RunRecord:
    """run.json but for the outcome."""
    parameters = trainable(segmenter)
    sources = {"backbone": config.backbone, "initial_weights": config.initial_weights}  # no path of this machine
    return RunRecord(
        config={**config.to_json(), **{key: Path(value).name for key, value in sources.items() if value}},
        fold=fold,
        split=split,
        backbone={"name": card.name, "licence": card.licence, "digest": card.file_digest},
        num_parameters={
            "trained": sum(parameter.numel() for parameter in parameters.values()),
            "all": sum(parameter.numel() for parameter in segmenter.parameters()),
        },
        pretrained_on=pretrained_on,
        device=device.type,
        num_threads=torch.get_num_threads(),
        python=platform.python_version(),
        identity=identity,
    )


def _take_best(segmenter: Segmenter, outcome: Outcome) -> None:
    with torch.no_grad():
        for name, parameter in trainable(segmenter).items():
            parameter.copy_(outcome.weights[name])
    segmenter.eval()


def _summary(outcome: Outcome, run_folder: Path) -> RunSummary:
    return RunSummary(
        run_folder=str(run_folder),
        ended_by=outcome.ended_by,
        num_steps=outcome.num_steps,
        num_skipped=outcome.num_skipped,
        best_dice=outcome.best_dice,
        best_step=outcome.best_step,
        elapsed_s=round(outcome.elapsed_s, 1),
    )
