"""Where training may start: the weights of another model, part by part where they fit, and a report of what did not."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from voxdino.core.errors import WeightsError
from voxdino.core.geometry import format_shape
from voxdino.core.safe_files import MANIFEST_NAME, Manifest, read_json
from voxdino.models.foreign import BACKBONE
from voxdino.models.lora import merged_state
from voxdino.models.segmenter import ModelConfig, Segmenter
from voxdino.models.tensor_files import read_tensors
from voxdino.models.weights import read_weights

_RUN_FILES = ("model.json", "model.safetensors")
_CLASSIFIER = ".to_logits."
_OPTIONAL = (".adapter.", ".depth_adapter.", "patch_embed.proj.weight", "pos_embed", "mask_token")  # of a backbone


@dataclass(frozen=True)
class InitialReport:
    """What `load_initial` did.

    source:           the file, folder or imported name, without its path; digest: SHA-256 of the weights.
    taken:            parts (backbone, decoder, detail, ...) that were copied, with the number of tensors.
    anew:             parts that start anew, with the reason; "classifier" where only the number of classes differs.
    unused:           parts of the file that this model does not have; num_left: tensors of its backbone likewise.
    licence:          of the weights; None where it is not known.
    adapters_merged:  its low-rank adapters do not fit this model's and were added to the weights under them.
    backbone_changed: features of the backbone are not what they were: those cached before are of no use.
    """

    source: str
    digest: str
    licence: str | None
    taken: dict[str, int]
    anew: dict[str, str]
    unused: tuple[str, ...]
    num_left: int
    adapters_merged: bool
    backbone_changed: bool

    def told(self) -> tuple[str, ...]:
        """Lines for the user."""
        parts = ", ".join(f"{part} ({number} tensors)" for part, number in self.taken.items())
        lines = [f"starts from {self.source}: {parts}"]
        lines += [f"{part} starts anew: {reason}" for part, reason in self.anew.items()]
        if self.adapters_merged:
            lines.append("its low-rank adapters are merged into the backbone")
        if self.num_left:
            lines.append(f"{self.num_left} tensors of its backbone (adapters, say) have no place here and are left out")
        if self.unused:
            lines.append(f"not used of it: {', '.join(self.unused)}")
        return tuple(lines)


@torch.no_grad()
def load_initial(
    segmenter: Segmenter, source: str | PathLike[str], *, weights_folder: Path | None = None
) -> InitialReport:
    """Copy into `segmenter` each part of `source` that fits, whole or not at all.

    The classifier may differ in its number of classes; it then starts anew, and the rest of its part is taken.

    source: the name of imported weights, a file of weights (a whole model, ours or other authors', or a backbone), or
            the run folder of a trained model.
    Errors: those of loading; WeightsError where no part fits.
    """
    state, config, digest, licence = _read(source, weights_folder)
    own = segmenter.state_dict()
    adapted = {key: value for key, value in state.items() if ".adapter." in key}
    merge = bool(adapted) and not _adapters_fit(adapted, config, own, segmenter.config)
    if merge:
        state = merged_state(state, alpha=config.lora_alpha)
    taken, anew = dict[str, int](), dict[str, str]()
    changed = False
    for part in dict.fromkeys(key.partition(".")[0] for key in own):
        wanted = {key: value for key, value in own.items() if key.startswith(f"{part}.")}
        if reason := _why_not(part, wanted, state, config, segmenter.config):
            anew[part] = reason
            continue
        fits = [key for key, value in wanted.items() if key in state and state[key].shape == value.shape]
        if classifier := [key for key in wanted if _CLASSIFIER in key and key not in fits]:
            fits = [key for key in fits if _CLASSIFIER not in key]
            there, here = len(state[classifier[0]]), len(wanted[classifier[0]])
            anew["classifier"] = f"{there} outputs there, {here} here"
        if fits:
            taken[part] = len(fits)
        if part == "backbone":
            changed = merge or any(not torch.equal(wanted[key].cpu(), state[key]) for key in fits)
        for key in fits:
            wanted[key].copy_(state[key])
    if not taken:
        told = "; ".join(f"{part}: {reason}" for part, reason in anew.items())
        fix = "give the weights of the same backbone or the same decoder."
        raise WeightsError(f"no part of it fits this model ({told})", where=source, fix=fix)
    unused = tuple(dict.fromkeys(key.partition(".")[0] for key in state if key.partition(".")[0] not in taken))
    left = sum(key.startswith(BACKBONE) and key not in own for key in state) if "backbone" in taken else 0
    return InitialReport(Path(source).name, digest, licence, taken, anew, unused, left, merge, changed)


def _why_not(
    part: str, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], there: ModelConfig, here: ModelConfig
) -> str | None:
    """Why a part cannot be taken; None where it can."""
    if not any(key.startswith(f"{part}.") for key in state):
        return "it has none"
    if part != "backbone" and there.decoder != here.decoder:
        return f"made for decoder {there.decoder}"
    problems = []
    for key, value in wanted.items():
        if _CLASSIFIER in key or (part == "backbone" and any(name in key for name in _OPTIONAL)):
            continue
        if key not in state:
            problems.append(f"{key} is missing there")
        elif state[key].shape != value.shape:
            problems.append(f"{key} is {format_shape(state[key].shape)} there, {format_shape(value.shape)} here")
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{problems[0]}{more}" if problems else None


def _adapters_fit(
    adapted: Mapping[str, Tensor], config: ModelConfig, own: Mapping[str, Tensor], wanted: ModelConfig
) -> bool:
    """All of them, at the same scale: a half of them would be neither one model nor the other."""
    fit = all(key in own and own[key].shape == value.shape for key, value in adapted.items())
    return fit and config.lora_alpha / config.lora_rank == wanted.lora_alpha / wanted.lora_rank


def _read(
    source: str | PathLike[str], weights_folder: Path | None
) -> tuple[Mapping[str, Tensor], ModelConfig, str, str | None]:
    """A model's state in our names, its configuration (of a backbone alone: nothing but its name), digest, licence."""
    folder = Path(source)
    if (folder / MANIFEST_NAME).is_file():
        manifest = Manifest.read(folder)
        manifest.verify(folder, _RUN_FILES)
        card = read_json(folder / "model.json")
        config = ModelConfig.from_json(card.get("model"), where=folder / "model.json")
        tensors = {key: value.float() for key, value in read_tensors(folder / "model.safetensors")[0].items()}
        return tensors, config, manifest.files["model.safetensors"][0], card.get("licence")
    file = read_weights(source, weights_folder=weights_folder)
    if file.card.model is not None:
        return file.tensors, file.card.model.config, file.card.file_digest, file.card.licence
    state = {f"{BACKBONE}{key}": value for key, value in file.tensors.items()}
    return state, ModelConfig(backbone=file.card.name, num_outputs=1), file.card.file_digest, file.card.licence
