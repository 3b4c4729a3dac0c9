"""Trained models in a run folder: written whole with digests, read back complete or refused."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

import voxdino
from voxdino.core.errors import CheckpointError
from voxdino.core.geometry import Grid
from voxdino.core.records import Record
from voxdino.core.safe_files import Manifest, digest_json, write_atomic
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.probe import PROBE_NAME, Probe, probe_crop
from voxdino.inference.settings import PredictSettings
from voxdino.models.backbones.build import build_backbone
from voxdino.models.compose import build_segmenter
from voxdino.models.precision import channels_last
from voxdino.models.segmenter import ModelConfig, Segmenter
from voxdino.models.weights import read_tensors
from voxdino.models.weights_card import WeightsCard
from voxdino.preparation.plan import Plan

MODEL_FILES = ("model.json", "model.safetensors", "plan.json")
_COMPACT = (torch.float16, torch.bfloat16)


class ModelCard(Record):
    """model.json: how to build the model, where its backbone came from, and the licence it inherits from there."""

    model: ModelConfig
    backbone: WeightsCard
    licence: str
    voxdino_version: str
    format_version: int = 1


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model, ready to predict.

    name:   of its run folder.
    digest: of its files; two models with the same digest predict the same.
    """

    segmenter: Segmenter
    plan: Plan
    card: ModelCard
    name: str
    digest: str
    device: torch.device

    @property
    def licence(self) -> str:
        return self.card.licence

    def working_bytes(self, grid: Grid, settings: PredictSettings) -> int:
        """As a team of one (see `Team.working_bytes`)."""
        from voxdino.inference.team import Team  # which is made of loaded models

        return Team((self,)).working_bytes(grid, settings)

    def segment(
        self, volume: Volume, settings: PredictSettings, *, case: str, probabilities: Path | None = None
    ) -> LabelMap:
        """As a team of one (see `Team.segment`)."""
        from voxdino.inference.team import Team  # which is made of loaded models

        return Team((self,)).segment(volume, settings, case=case, probabilities=probabilities)


def save_model(run_folder: str | PathLike[str], segmenter: Segmenter, plan: Plan, card: WeightsCard) -> None:
    """Write model.safetensors, model.json, plan.json and the probe, then the manifest that makes them a model.

    Backbone included, so that the folder is all one needs. A tensor is stored in 16 bits where that loses nothing
    (frozen weights that came in 16 bits), else in 32. Errors: ResourceError when it cannot be written.
    """
    folder = Path(run_folder)
    config = segmenter.config.model_copy(update={"licence": card.licence})
    model_card = ModelCard(model=config, backbone=card, licence=card.licence, voxdino_version=voxdino.__version__)
    (folder / "manifest.json").unlink(missing_ok=True)  # while files change there is no model here
    state = {name: _compact(tensor.detach().cpu()) for name, tensor in segmenter.state_dict().items()}
    with write_atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    model_card.write(folder / "model.json")
    plan.write(folder / "plan.json")
    crop = probe_crop(plan)
    Probe.of(crop, _logits(segmenter, crop)).write(folder / PROBE_NAME)
    Manifest.of(folder, (*MODEL_FILES, PROBE_NAME)).write(folder)


def load_model(run_folder: str | PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a run folder, in eval mode on `device`.

    Errors: CheckpointError where a file is missing, damaged (digest), does not fit its model, or holds NaN, and where
    the probe comes out otherwise than when the model was written (models of before there were probes have none).
    """
    folder = _existing(run_folder)
    manifest = Manifest.read(folder)
    manifest.verify(folder, MODEL_FILES)
    card, plan = ModelCard.read(folder / "model.json"), Plan.read(folder / "plan.json")
    state = read_tensors(folder / "model.safetensors")[0]
    with torch.device("meta"):
        segmenter = build_segmenter(card.model, build_backbone(card.backbone.config))
    expected = segmenter.state_dict()
    _require_fit(state, expected, folder / "model.safetensors")
    state = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    segmenter.load_state_dict(state, strict=True, assign=True)
    target = torch.device(device)
    channels_last(segmenter)  # as in training
    segmenter.to(target).eval().requires_grad_(False)
    if PROBE_NAME in manifest.files:
        manifest.verify(folder, [PROBE_NAME])
        crop = probe_crop(plan)
        Probe.read(folder / PROBE_NAME).require_same(crop, _logits(segmenter, crop), folder)
    digest = digest_json({name: manifest.files[name][0] for name in MODEL_FILES})
    return LoadedModel(segmenter, plan, card, folder.resolve().name, digest, target)


@torch.no_grad()
def _logits(segmenter: Segmenter, crop: Float[np.ndarray, "1 C Dk h w"]) -> Float[np.ndarray, "1 K D h w"]:
    """In eval mode, wherever the model is; it stays as it was."""
    is_training = segmenter.training
    segmenter.eval()
    twice = torch.from_numpy(np.concatenate((crop, crop)))  # norms of torch refuse a single value
    logits = segmenter(twice.to(next(segmenter.parameters()).device)).logits[:1].float().cpu().numpy()
    segmenter.train(is_training)
    return np.asarray(logits)


def load_plan(run_folder: str | PathLike[str]) -> Plan:
    """The plan of a run folder alone. Errors: CheckpointError, ConfigError where there is none."""
    return Plan.read(_existing(run_folder) / "plan.json")


def _existing(run_folder: str | PathLike[str]) -> Path:
    folder = Path(run_folder)
    if not folder.is_dir():
        raise CheckpointError("no such run folder.", where=folder, fix="give the folder that `voxdino finetune` wrote.")
    return folder


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in the smallest type that holds all its values exactly."""
    if tensor.dtype == torch.float32:
        for dtype in _COMPACT:
            small = tensor.to(dtype)
            if torch.equal(small.to(torch.float32), tensor):
                return small.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)  # its own memory: safetensors refuses shared ones


def _require_fit(state: dict[str, Tensor], model: dict[str, Tensor], path: Path) -> None:
    problems = [f"{name} is missing" for name in model if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in model]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(model[name].shape)}"
        for name in model
        if name in state and state[name].shape != model[name].shape
    ]
    fix = "train the model again, or fetch the run folder again from where it was trained."
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"does not fit model.json: {'; '.join(problems[:3])}{more}.", where=path, fix=fix)
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"holds NaN or infinity, first in {broken[0]}.", where=path, fix=fix)
