"""One classification run: labelled images and a backbone in, a folder with a calibrated classifier out."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import voxdino
from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import sweep_temporary
from voxdino.data.labelled import ImageShape, LabelledBatch, assemble_images, choose_channels
from voxdino.data.loader import ReadAhead
from voxdino.finetuning.classify_recipes import ClassifyConfig
from voxdino.inference.classify import ClassifierCard, save_classifier
from voxdino.models.classifier import Classifier, build_classifier, encoder_config, probabilities
from voxdino.models.precision import autocast, resolve_device, uses_bf16
from voxdino.models.segmenter import ModelConfig
from voxdino.models.weights import load_backbone
from voxdino.models.weights_card import WeightsCard
from voxdino.preparation.case import SplitName
from voxdino.preparation.classification import ClassificationSet
from voxdino.probes.calibration import fit_temperature
from voxdino.probes.class_tokens import accuracy
from voxdino.probes.pooling import fit_bag_probe
from voxdino.training.checkpoint import flatten, read_state, require_same
from voxdino.training.config import FREE_TO_CHANGE
from voxdino.training.loop import Job, Validation, train
from voxdino.training.state import trainable
from voxdino.training.stopping import stop_on_signals
from voxdino.training.tracking import Event, Listener, show_progress

MAX_EPOCH_STEPS = 250
DEFAULT_BATCH = 16


class ClassifySummary(Record):
    """How a run ended.

    likelihood: geometric mean of the probability of the true label, of the validation cases; accuracy: of them, None
    for several labels.
    """

    run_folder: str
    num_steps: int
    likelihood: float
    accuracy: float | None
    temperature: float
    elapsed_s: float
    was_finished: bool = False


class ClassifyRecord(Record):
    """run.json. No absolute path, no host name: runs are shared. outcome: None while the run has not ended."""

    config: dict[str, Any]
    dataset: str
    classes: tuple[str, ...]
    num_cases: dict[str, int]
    backbone: dict[str, str | None]
    num_parameters: dict[str, int]
    device: str
    python: str
    identity: dict[str, Any]
    outcome: ClassifySummary | None = None


def finetune_classifier(
    found: ClassificationSet,
    config: ClassifyConfig,
    *,
    run_folder: Path,
    device: str = "auto",
    weights_folder: Path | None = None,
    on_event: Listener | None = None,
) -> ClassifySummary:
    """Fit the linear probe, train on where the recipe says so, calibrate; the same call continues what broke off.

    Cases of val choose the penalty, the weights and the temperature; cases of test are never looked at.
    Writes run.json, model.json, model.safetensors and, where something trains, checkpoint/, log.jsonl, curves.png.
    Errors: ConfigError, DatasetError, WeightsError and CheckpointError for what does not fit together; ResourceError
    for the lock, the disk, the device; StoppedError; DivergedError.
    """
    started = time.monotonic()
    with lock_folder(run_folder), torch.random.fork_rng(devices=[]):
        sweep_temporary(run_folder)
        torch.manual_seed(config.seed)
        target = resolve_device(device)
        backbone, card = load_backbone(config.backbone, weights_folder=weights_folder)
        shape = _shape(found, config, backbone.patch_size)
        encoder = _encoder(config, card, num_channels=len(shape.channels))
        kinds: dict[str, Any] = {"kind": found.kind, "pooling": config.pooling}
        model = build_classifier(encoder, backbone, num_classes=found.num_classes, **kinds).to(target)
        record = _record(found, config, model, card, shape, target)
        if (path := run_folder / "run.json").exists():
            previous = read_state(ClassifyRecord, path, fix="delete it: the run then starts again.")
            require_same(previous.identity, record.identity, where=run_folder)
            if previous.outcome is not None:
                return previous.outcome.model_copy(update={"run_folder": str(run_folder), "was_finished": True})
        record.write(path)
        with show_progress(on_event) as listen:
            run = _Run(found, config, shape, model, target, listen)
            run.fit_head()
            num_steps = 0 if config.adaptation == "frozen" else run.train(run_folder, record.identity, started)
            logits, labels = run.predict("val")
        temperature = fit_temperature(logits, labels, found.kind) if config.calibrate else 1.0
        told = ClassifierCard(
            model=encoder,
            backbone=card,
            classes=found.class_names,
            shape=shape,
            temperature=temperature,
            licence=card.licence,
            voxdino_version=voxdino.__version__,
            **kinds,
        )
        save_classifier(run_folder, model, told)
        chances = probabilities(model, [logits], temperature)
        summary = ClassifySummary(
            run_folder=run_folder.name,
            num_steps=num_steps,
            likelihood=_likelihood(model, logits / temperature, labels),
            accuracy=None if found.kind == "multi" else accuracy(chances, labels),
            temperature=temperature,
            elapsed_s=round(time.monotonic() - started, 1),
        )
        record.model_copy(update={"outcome": summary}).write(path)
        return summary.model_copy(update={"run_folder": str(run_folder)})


class _Run:
    """The parts of a run that share its model and its images."""

    def __init__(
        self,
        found: ClassificationSet,
        config: ClassifyConfig,
        shape: ImageShape,
        model: Classifier,
        device: torch.device,
        listen: Listener,
    ) -> None:
        self.found, self.config, self.shape, self.listen = found, config, shape, listen
        self.model, self.device = model, device
        self.amp = uses_bf16(device, config.amp)
        self.batch_size = config.batch_size or DEFAULT_BATCH
        self.augmentation = config.augment.for_dimensions(found.ndim)

    def fit_head(self) -> None:
        """The head becomes the probe of the features as they are now."""
        probe = fit_bag_probe(
            *self._compute("train", self.model.bags),
            *self._compute("val", self.model.bags),
            pooling=self.config.pooling,
            kind=self.found.kind,
            num_classes=self.found.num_classes,
            num_members=1,
            seed=self.config.seed,
        )
        self.model.head.load_state_dict(probe.heads[0].state_dict())
        self.model.mean.copy_(probe.mean)
        self.model.sd.copy_(probe.sd)
        self.listen(Event("note", f"linear probe: penalty {probe.linear.strength:g}"))

    def predict(self, split: SplitName) -> tuple[Tensor, Tensor]:
        """Logits and labels."""
        logits, labels = self._compute(split, self.model)
        return torch.stack(logits), labels

    def train(self, run_folder: Path, identity: dict[str, Any], started: float) -> int:
        """Train all that trains; the model is left with its best weights. Returns the number of steps."""
        config, cases = self.config, self.found.splits["train"]
        per_epoch = config.steps_per_epoch or min(MAX_EPOCH_STEPS, -(-len(cases) // self.batch_size))
        groups = self.model.parameter_groups(
            config.learning_rate, backbone_lr_scale=config.backbone_lr_scale, weight_decay=config.weight_decay
        )
        with stop_on_signals() as stop:
            outcome = train(
                Job(
                    model=self.model,
                    groups=groups,
                    predict=lambda batch: self.model(batch.image),
                    loss=lambda logits, labels: self.model.head.objective.loss(logits.float(), labels),
                    batches=lambda first: self._batches(first, per_epoch),
                    validate=self._validate,
                    num_steps=config.num_epochs * per_epoch,
                    steps_per_epoch=per_epoch,
                    identity=identity,
                    measure="likelihood",
                ),
                config,
                run_folder=run_folder,
                device=self.device,
                stop=stop,
                listen=self.listen,
                spent_s=time.monotonic() - started,
            )
        with torch.no_grad():
            for name, parameter in trainable(self.model).items():
                parameter.copy_(outcome.weights[name])
        self.model.eval()
        return outcome.num_steps

    def _validate(self, stop: Callable[[], bool]) -> Validation | None:
        logits, labels = self.predict("val")
        return None if stop() else Validation(_likelihood(self.model, logits, labels), {})

    @contextmanager
    def _batches(self, first: int, per_epoch: int) -> Iterator[Iterator[LabelledBatch]]:
        cases, size = self.found.splits["train"], self.batch_size

        def fetch(step: int) -> LabelledBatch:
            epoch = step // per_epoch
            order = np.random.default_rng([self.config.seed, 21, epoch]).permutation(len(cases))
            places = np.arange(step % per_epoch * size, (step % per_epoch + 1) * size) % len(cases)
            chosen = [cases[int(place)] for place in order[places]]
            return assemble_images(chosen, self.shape, epoch=step + 1, seed=self.config.seed)

        with ReadAhead(fetch, first=first, num_threads=self.config.num_workers) as batches:
            yield (batch.to(self.device).augmented(self.augmentation) for batch in batches)

    def _compute(self, split: SplitName, compute: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        """What `compute` gives for each image of a split, on the CPU, and the labels."""
        cases, size = self.found.splits[split], self.config.eval_batch
        was_training, results = self.model.training, list[Tensor]()
        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.amp):
            for first in range(0, len(cases), size):
                image = assemble_images(cases[first : first + size], self.shape).image
                results += compute(image.to(self.device)).float().cpu().unbind()
                self.listen(Event("encode", split, min(first + size, len(cases)), len(cases)))
        self.model.train(was_training)
        return results, torch.from_numpy(self.found.labels(split))


def _likelihood(model: Classifier, logits: Tensor, labels: Tensor) -> float:
    return float((-model.head.objective.loss(logits.float(), labels)).exp())


def _shape(found: ClassificationSet, config: ClassifyConfig, patch_size: int) -> ImageShape:
    side = max(1, round(config.side / patch_size)) * patch_size
    slices = {"num_slices": config.num_slices, "slice_axis": config.slice_axis} if found.ndim == 3 else {}
    return ImageShape(channels=choose_channels(found), side=side, **slices)


def _encoder(config: ClassifyConfig, card: WeightsCard, *, num_channels: int) -> ModelConfig:
    settings = {name: getattr(config, name) for name in ("adaptation", "lora_rank", "lora_alpha")}
    name = Path(config.backbone).name  # no path of this machine in a file that is shared
    return encoder_config(name, card.licence, num_channels=num_channels, settings=settings)


def _record(
    found: ClassificationSet,
    config: ClassifyConfig,
    model: Classifier,
    card: WeightsCard,
    shape: ImageShape,
    device: torch.device,
) -> ClassifyRecord:
    """run.json but for the outcome; weights and images count by their content, wherever they lie."""
    settings = {key: value for key, value in config.to_json().items() if key not in {*FREE_TO_CHANGE, "backbone"}}
    dataset = found.content_digest("train", "val")  # images of test are not used
    digests = {"backbone": card.file_digest, "dataset": dataset, "shape": shape.digest()}
    versions = {"voxdino": voxdino.__version__, "torch": str(torch.__version__)}
    return ClassifyRecord(
        config={**config.to_json(), "backbone": Path(config.backbone).name},
        dataset=found.name,
        classes=found.class_names,
        num_cases={split: len(cases) for split, cases in found.splits.items()},
        backbone={"name": card.name, "licence": card.licence},
        num_parameters={
            "trained": sum(parameter.numel() for parameter in trainable(model).values()),
            "all": sum(parameter.numel() for parameter in model.parameters()),
        },
        device=device.type,
        python=platform.python_version(),
        identity=flatten({**settings, **digests, **versions}),
    )
