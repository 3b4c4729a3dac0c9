"""Whole models of other authors, turned into ours: recognised by their keys, complete or refused.

SegDINO v1 and v2, MedDINOv3 as fine-tuned, DINO-Med3D stage 1 and 2 (dossier 1.7, 2.8, 3). What a file holds beyond a
complete model of ours is listed, never guessed at. A new system is one function and one line in SYSTEMS.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from voxdino.core.errors import ConfigError, WeightsError
from voxdino.core.geometry import format_shape
from voxdino.core.records import Record
from voxdino.models.backbones.build import BackboneConfig, build_backbone
from voxdino.models.compose import build_segmenter
from voxdino.models.decoders.primus import from_meddinov3_decoder
from voxdino.models.decoders.segdino_v1 import from_segdino_v1
from voxdino.models.decoders.tpa_sad import from_segdino_v2
from voxdino.models.decoders.upernet3d import from_dinomed3d_stage2
from voxdino.models.layouts import BackboneState, as_float32, convert
from voxdino.models.lora import merged_state
from voxdino.models.segmenter import ModelConfig, Segmenter
from voxdino.models.tensor_files import FACT

Tensors = dict[str, Tensor]
Where = str | PathLike[str] | None
BACKBONE = "backbone."
_ADAPTER = ".adapter."
_MAX_NAMED = 4
_WHOLE = "get the complete file as its authors' code writes it; nothing is loaded in part."
_FACTS = ("num_classes", "label_mapping", "norm_stats")  # entries beside the weights that say how they were trained
_SEGDINO_TAPS = {24: (4, 11, 17, 23)}  # 4 where others have 5 (dossier 7.2)


class ImportedModel(Record):
    """What a model of other authors is; part of its card.

    config:         builds it around its backbone.
    num_parameters: of all but the backbone; adapters in it count.
    facts:          what the checkpoint says of its training, as JSON: classes, label values, grey statistics.
    unmapped:       tensors there is no place for in our model, with their shapes.
    dropped:        tensors left out on purpose, with the reason.
    """

    system: str
    config: ModelConfig
    num_parameters: int
    facts: dict[str, str] = Field(default_factory=dict)
    unmapped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Settings of a fine-tuning (`--set`) under which all its weights fit."""
        config = self.config
        chosen: dict[str, Any] = {"decoder": config.decoder, "taps": list(config.taps or ())}
        if config.decoder not in ("linear", "primus", "primus_single"):
            chosen["decoder_width"] = config.decoder_width
        pyramid = {"pyramid": config.pyramid} if config.pyramid != "x8_x4_x2_x1" else {}
        if config.decoder == "tpa_sad":
            chosen["pyramid_scales"] = list(config.pyramid_scales)
        if further := {**config.decoder_settings, **pyramid}:
            chosen["decoder_settings"] = further
        if not config.tap_norm:
            chosen["tap_norm"] = False
        if config.detail != "none":
            chosen |= {"detail": config.detail, "detail_width": config.detail_width}
        if config.adaptation == "lora":
            chosen |= {"adaptation": "lora", "lora_rank": config.lora_rank}
        return chosen

    def around(self, name: str) -> "ImportedModel":
        """The same around the backbone `name`."""
        return self.model_copy(update={"config": self.config.model_copy(update={"backbone": name})})


@dataclass(frozen=True, eq=False)
class ForeignModel:
    """backbone: alone, adapters merged. tensors: the complete state of our Segmenter, `backbone.` and all the rest."""

    backbone: BackboneState
    tensors: Tensors
    description: ImportedModel


@dataclass
class _Draft:
    """A state with its keys translated: the backbone's without prefix and adapters, everything else in our names."""

    backbone: Tensors
    parts: Tensors
    config: dict[str, Any]  # fields of ModelConfig
    taps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # by depth, where they are not the usual ones
    backbone_settings: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def recognise(tensors: Mapping[str, Tensor]) -> str | None:
    """The system in SYSTEMS that wrote these keys; None for a backbone alone and for everything unknown."""
    keys = _unwrapped(tensors)
    return next((name for name, (is_one, _) in SYSTEMS.items() if is_one(keys)), None)


def convert_model(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    facts: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    where: Where = None,
) -> ForeignModel:
    """A recognised state as a complete state of ours.

    name:     of the imported weights, by which the model will name its backbone.
    facts:    metadata of the file; those entries are kept that say how the model was trained.
    settings: fields of the backbone's configuration that the file cannot say.
    Errors: WeightsError where the backbone or the rest is incomplete, of other shapes, or not finite.
    """
    keys = _unwrapped(tensors)
    system = recognise(keys)
    assert system is not None, "recognise first"
    draft = SYSTEMS[system][1](keys)
    if not draft.backbone:
        fix = "get the file that holds the whole model; a decoder is of no use without the encoder it was trained on."
        raise WeightsError(f"{system} without its backbone", where=where, fix=fix)
    backbone = convert(draft.backbone, settings={**draft.backbone_settings, **(settings or {})}, where=where)
    config = ModelConfig(backbone=name, **draft.config)
    model = _without_weights(config, backbone.config, system, where)
    expected = model.state_dict()
    config = config.model_copy(update={"taps": draft.taps.get(model.backbone.depth, model.taps)})
    inner = {f"{BACKBONE}{key}": value for key, value in backbone.tensors.items()}
    needed = {key: value for key, value in expected.items() if key not in inner}
    _require_complete(draft.parts, needed, system, where)
    parts, _ = as_float32({key: draft.parts[key] for key in needed}, where)
    whole = {**inner, **parts}
    description = ImportedModel(
        system=system,
        config=config,
        num_parameters=sum(value.numel() for value in parts.values()),
        facts={key: facts[f"{FACT}{key}"] for key in _FACTS if facts and f"{FACT}{key}" in facts},
        unmapped=tuple(_told(key, value) for key, value in draft.parts.items() if key not in needed),
        dropped=tuple(draft.dropped),
    )
    return ForeignModel(_backbone_alone(whole, backbone, config), whole, description)


def backbone_of_model(
    tensors: Mapping[str, Tensor],
    description: ImportedModel,
    config: BackboneConfig,
    *,
    settings: Mapping[str, str] | None = None,
    where: Where = None,
) -> BackboneState:
    """The backbone of a model that was imported. Errors: WeightsError where the model is not complete."""
    expected = _without_weights(description.config, config, description.system, where).state_dict()
    _require_complete(tensors, expected, description.system, where)
    return convert(_backbone_part(tensors, description.config), own_config=config, settings=settings, where=where)


def _without_weights(config: ModelConfig, backbone: BackboneConfig, system: str, where: Where) -> Segmenter:
    try:
        with torch.device("meta"):
            return build_segmenter(config, build_backbone(backbone))
    except (ConfigError, RuntimeError) as error:
        raise WeightsError(f"looks like {system}, but cannot be built ({error})", where=where, fix=_WHOLE) from error


def _backbone_alone(whole: Tensors, backbone: BackboneState, config: ModelConfig) -> BackboneState:
    merged = _backbone_part(whole, config)
    adapted = sum(_ADAPTER in key for key in whole) // 2
    note = (f"{adapted} low-rank adapters; the backbone alone has them merged",) if adapted else ()
    return BackboneState(backbone.layout, backbone.config, merged, (*backbone.notes, *note))


def _backbone_part(whole: Mapping[str, Tensor], config: ModelConfig) -> Tensors:
    """The backbone of a model's state, without prefix, low-rank adapters merged into the weights under them."""
    own = {key.removeprefix(BACKBONE): value for key, value in whole.items() if key.startswith(BACKBONE)}
    return merged_state(own, alpha=config.lora_alpha)


def _unwrapped(tensors: Mapping[str, Tensor]) -> Tensors:
    """Without the prefixes of parallel and compiled modules."""
    return {re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", key): value for key, value in tensors.items()}


def _split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The backbone, whatever it is called there, without prefix; and the rest."""
    found = sorted((key for key in tensors if key.endswith("cls_token")), key=len)
    if not found:
        return {}, tensors
    prefix = found[0].removesuffix("cls_token").removesuffix("embeddings.")
    backbone = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return backbone, {key: value for key, value in tensors.items() if not key.startswith(prefix)}


def _decoder(parts: Tensors) -> Tensors:
    return {f"decoder.{key}": value for key, value in parts.items()}


def _read_segdino_v1(tensors: Tensors) -> _Draft:
    backbone, rest = _split(tensors)
    parts = _decoder(from_segdino_v1(rest))
    config = {
        "decoder": "segdino_v1",
        "decoder_width": _size(parts, "decoder.convolve.0.weight"),
        "decoder_settings": {"head_form": "release" if "decoder.enlarge.weight" in parts else "paper"},
    }
    return _Draft(backbone, parts, config | _as_segdino(parts), _SEGDINO_TAPS)


def _read_segdino_v2(tensors: Tensors) -> _Draft:
    backbone, rest = _split(tensors)
    parts = _decoder(from_segdino_v2(rest))
    config = {
        "decoder": "tpa_sad",
        "decoder_width": _size(parts, "decoder.project.0.weight"),
        "pyramid": "first_release" if "decoder.levels.0.weight" in parts else "x8_x4_x2_x1",
    }
    return _Draft(backbone, parts, config | _as_segdino(parts), _SEGDINO_TAPS)


def _as_segdino(parts: Tensors) -> dict[str, Any]:
    num_outputs = _size(parts, "decoder.to_logits.weight")
    return {"num_outputs": num_outputs, "input_builder": "rgb", "num_channels": 3, "adaptation": "full"}


def _read_meddinov3(tensors: Tensors) -> _Draft:
    """As fine-tuned by the authors' nnU-Net trainers; options of the backbone as they build it (dossier 2.8)."""
    backbone, rest = _split(tensors)
    parts = _decoder(from_meddinov3_decoder(rest))
    several = _size(parts, "decoder.doublings.0.conv.weight") > _size(backbone, "cls_token", -1)
    config = {
        "decoder": "primus" if several else "primus_single",
        "num_outputs": _size(parts, "decoder.to_logits.weight"),
        "adaptation": "full",
    }
    return _Draft(backbone, parts, config, backbone_settings={"norm_eps": "1e-6", "rope_dtype": "bfloat16"})


def _is_proxy(tensors: Tensors) -> bool:
    """A backbone and one 1 x 1 convolution."""
    head = [value for key, value in tensors.items() if key.startswith("head.")]
    others = [key for key in tensors if not key.startswith((BACKBONE, "base_model.", "head."))]
    return not others and len(head) <= 2 and any(value.ndim == 4 and value.shape[2:] == (1, 1) for value in head)


def _read_stage_1(tensors: Tensors) -> _Draft:
    draft = _dinomed3d({re.sub(r"^backbone\.", "encoder.backbone.", key): value for key, value in tensors.items()})
    for key in [key for key in draft.parts if key.startswith("head.")]:
        value = draft.parts.pop(key)
        kind = "weight" if value.ndim > 1 else "bias"
        draft.parts[f"decoder.to_logits.{kind}"] = value.flatten(1) if value.ndim > 1 else value
    draft.config = {"adaptation": "full"} | draft.config
    draft.config |= {"decoder": "linear", "num_outputs": _size(draft.parts, "decoder.to_logits.weight")}
    return draft


def _read_stage_2(tensors: Tensors) -> _Draft:
    draft = _dinomed3d(tensors)
    kernel, stem = tensors.get("adapter_3d.up4.3.weight"), "cnn_encoder.stem.0.weight"
    draft.config |= {
        "decoder": "upernet3d",
        "decoder_width": _size(tensors, "adapter_3d.id1.0.weight"),
        "decoder_settings": {"release_kernels": kernel is not None and kernel.ndim == 5 and kernel.shape[2] > 1},
        "detail": "volume",
        "detail_width": _size(tensors, stem),
        "num_channels": _size(tensors, stem, 1),
        "num_outputs": _size(tensors, "decoder_final.cls_seg.weight"),
    }
    reason = "the UPerNet's own classifier, which the refinement replaces"
    draft.dropped += [f"{_told(key, tensors[key])}: {reason}" for key in tensors if key.startswith("decoder.cls.")]
    return draft


def _dinomed3d(tensors: Tensors) -> _Draft:
    """Neighbouring slices as colours, raw taps; low-rank adapters where the file holds some."""
    renamed = from_dinomed3d_stage2(tensors)
    own = {key for key in renamed if key.startswith(BACKBONE) and _ADAPTER not in key}
    parts = {key: value for key, value in renamed.items() if key not in own}
    config: dict[str, Any] = {"tap_norm": False, "input_builder": "neighbours", "context_slices": 1}
    ranks = [len(value) for key, value in parts.items() if key.endswith(f"{_ADAPTER}down.weight")]
    config |= {"adaptation": "lora", "lora_rank": ranks[0]} if ranks else {}
    return _Draft({key.removeprefix(BACKBONE): renamed[key] for key in renamed if key in own}, parts, config)


def _size(tensors: Tensors, key: str, axis: int = 0) -> int:
    """1 where there is no such tensor: what is missing is told later, with everything else that is."""
    value = tensors.get(key)
    return 1 if value is None or value.ndim < 2 else value.shape[axis]


def _require_complete(parts: Mapping[str, Tensor], needed: Mapping[str, Tensor], system: str, where: Where) -> None:
    problems = [f"{key} is missing" for key in needed if key not in parts]
    problems += [
        f"{key} is {format_shape(parts[key].shape)}, not {format_shape(value.shape)}"
        for key, value in needed.items()
        if key in parts and parts[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise WeightsError(
            f"looks like {system}, but does not fit it: {'; '.join(problems[:_MAX_NAMED])}{more}",
            where=where,
            fix=_WHOLE,
        )


def _told(key: str, value: Tensor) -> str:
    return f"{key} ({format_shape(value.shape)})"


def _holds(*names: str) -> Callable[[Tensors], bool]:
    return lambda tensors: all(name in tensors for name in names)


SYSTEMS: dict[str, tuple[Callable[[Tensors], bool], Callable[[Tensors], _Draft]]] = {  # whether it is one; its reader
    "DINO-Med3D, stage 2": (
        _holds("cnn_encoder.stem.0.weight", "adapter_3d.id1.0.weight", "decoder_final.cls_seg.weight"),
        _read_stage_2,
    ),
    "DINO-Med3D, stage 1": (_is_proxy, _read_stage_1),
    "MedDINOv3, fine-tuned": (_holds("up_projection.decode.0.0.weight"), _read_meddinov3),
    "SegDINO v2": (_holds("decoder.token_projections.0.weight", "decoder.out_conv.weight"), _read_segdino_v2),
    "SegDINO v1": (_holds("head.projects.0.weight", "head.scratch.output_conv.weight"), _read_segdino_v1),
}
