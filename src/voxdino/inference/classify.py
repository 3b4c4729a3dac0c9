"""Trained classifiers in a run folder, and probabilities of new cases."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from voxdino.core.errors import CheckpointError, InputError, PartialError, UsageError, VoxdinoError, without_folders
from voxdino.core.labels import LabelKind
from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import Manifest, digest_json, write_atomic
from voxdino.data.labelled import ImageShape, read_image
from voxdino.models.backbones.build import build_backbone
from voxdino.models.classifier import Classifier, build_classifier, probabilities
from voxdino.models.segmenter import ModelConfig
from voxdino.models.weights import read_tensors
from voxdino.models.weights_card import WeightsCard
from voxdino.preparation.classification import LabelledCase

MODEL_FILES = ("model.json", "model.safetensors")
TABLE, RECORD = "probabilities.csv", "probabilities.json"


class ClassifierCard(Record):
    """model.json: how to build the classifier and feed it, what it says, and the licence it inherits.

    temperature: logits are divided by it; 1.0 where it was not calibrated.
    """

    model: ModelConfig
    backbone: WeightsCard
    kind: LabelKind
    classes: tuple[str, ...]
    pooling: str
    shape: ImageShape
    temperature: float
    licence: str
    voxdino_version: str


@dataclass(frozen=True, eq=False)
class LoadedClassifier:
    """A trained classifier, ready to predict. digest: of its files."""

    model: Classifier
    card: ClassifierCard
    name: str
    digest: str
    device: torch.device


class CaseProbabilities(Record):
    """predicted: the most probable class; of several labels all above 0.5."""

    probabilities: dict[str, float]
    predicted: tuple[str, ...]


class ClassPredictions(Record):
    """probabilities.json: which model, and what it says of every case. failed: id -> message."""

    model: str
    model_digest: str
    licence: str
    kind: LabelKind
    classes: tuple[str, ...]
    temperature: float
    cases: dict[str, CaseProbabilities]
    failed: dict[str, str]


def save_classifier(folder: Path, model: Classifier, card: ClassifierCard) -> None:
    """Write the tensors, model.json and then the manifest that makes them a model."""
    (folder / "manifest.json").unlink(missing_ok=True)  # while files change there is no model here
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with write_atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    card.write(folder / "model.json")
    Manifest.of(folder, MODEL_FILES).write(folder)


def load_classifier(run_folder: Path, device: str | torch.device = "cpu") -> LoadedClassifier:
    """Errors: CheckpointError where a file is missing, damaged, or does not fit its model."""
    manifest = Manifest.read(run_folder)
    manifest.verify(run_folder, MODEL_FILES)
    card = ClassifierCard.read(run_folder / "model.json")
    with torch.device("meta"):
        backbone = build_backbone(card.backbone.config)
        model = build_classifier(
            card.model, backbone, num_classes=len(card.classes), kind=card.kind, pooling=card.pooling
        )
    try:
        model.load_state_dict(read_tensors(run_folder / "model.safetensors")[0], strict=True, assign=True)
    except RuntimeError as error:
        fix = "train the model again, or fetch the run folder again from where it was trained."
        raise CheckpointError(f"does not fit model.json ({str(error)[:200]})", where=run_folder, fix=fix) from error
    target = torch.device(device)
    model.to(target).eval().requires_grad_(False)
    digest = digest_json({name: manifest.files[name][0] for name in MODEL_FILES})
    return LoadedClassifier(model, card, run_folder.resolve().name, digest, target)


def classify_cases(
    cases: Sequence[LabelledCase],
    loaded: LoadedClassifier,
    out_folder: Path,
    *,
    strict: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ClassPredictions:
    """Write probabilities.csv and probabilities.json, a row per case, into `out_folder`; earlier ones are replaced.

    Each case goes through alone: what it gets does not depend on the others.
    Errors: UsageError for no case; PartialError at the end where some could not be read (`strict`: their own error).
    """
    if not cases:
        raise UsageError("there is no case to predict.", fix="give image files, a folder of them, or a data set.")
    found, failed = dict[str, CaseProbabilities](), dict[str, str]()
    with lock_folder(out_folder), torch.inference_mode():
        for done, case in enumerate(cases, start=1):
            try:
                image = read_image(case, loaded.card.shape)
            except (InputError, VoxdinoError) as error:
                if strict or len(cases) == 1:
                    raise
                failed[case.id] = without_folders(error, {case.file.parent: ""})
            else:
                logits = loaded.model(image[None].to(loaded.device))
                chances = probabilities(loaded.model, [logits], loaded.card.temperature)[0].tolist()
                found[case.id] = _told(chances, loaded.card)
            if on_progress is not None:
                on_progress(done, len(cases))
        record = ClassPredictions(
            model=loaded.name,
            model_digest=loaded.digest,
            licence=loaded.card.licence,
            kind=loaded.card.kind,
            classes=loaded.card.classes,
            temperature=loaded.card.temperature,
            cases=found,
            failed=failed,
        )
        _write_table(out_folder / TABLE, record)
        record.write(out_folder / RECORD)
    if failed:
        first = next(iter(failed))
        fact = f"{len(failed)} of {len(cases)} cases could not be read; first {first}: {failed[first]}"
        raise PartialError(fact, where=out_folder, fix=f"see {RECORD}.")
    return record


def _told(chances: Sequence[float], card: ClassifierCard) -> CaseProbabilities:
    by_name = {name: round(value, 6) for name, value in zip(card.classes, chances, strict=True)}
    predicted = tuple(name for name, value in by_name.items() if value > 0.5)
    if card.kind != "multi":
        predicted = (max(by_name, key=lambda name: by_name[name]),)
    return CaseProbabilities(probabilities=by_name, predicted=predicted)


def _write_table(path: Path, record: ClassPredictions) -> None:
    """case,predicted,<one column per class>."""
    with write_atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["case", "predicted", *record.classes])
        for name, case in record.cases.items():
            table.writerow([name, "|".join(case.predicted), *case.probabilities.values()])
