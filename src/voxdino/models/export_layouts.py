"""Backbones written in the layouts of others: official, Hugging Face, timm; each reads back to the same numbers.

The inverse of voxdino.models.layouts and convnext_layouts, from the same tables (dossier 5.3 and 5.6). What a layout
has no place for is left out and said; what its files do not say and a reader must be told is said too.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from voxdino.core.errors import ConfigError, UsageError, WeightsError
from voxdino.core.records import Record
from voxdino.core.safe_files import require_free_space, write_atomic, write_json, write_text
from voxdino.models.backbones.build import BackboneConfig
from voxdino.models.backbones.convnext import ConvNeXtConfig
from voxdino.models.backbones.rope import rope_periods
from voxdino.models.backbones.timm_bridge import TimmConfig
from voxdino.models.backbones.vit import ViTConfig
from voxdino.models.export_configs import (
    convnext_hub_config,
    dinov2_hub_config,
    timm_config,
    timm_epsilon,
    vit_hub_config,
)
from voxdino.models.layouts import as_float32, convert, convert_timm
from voxdino.models.model_card import model_card
from voxdino.models.registry import look_up
from voxdino.models.weights import load_backbone

Tensors = dict[str, Tensor]
Rules = list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Exported:
    """A backbone in another layout.

    tensors:  by the layout's names, float32, each in its own memory.
    config:   its config.json; None where the layout has none.
    settings: what its files do not say and a reader must be told, {"norm_eps": "1e-06"}.
    notes:    what was left out, or is computed differently there.
    kept, kept_config: what reading it gives: our names, bit for bit.
    """

    tensors: Tensors
    config: dict[str, Any] | None
    settings: dict[str, str]
    notes: tuple[str, ...]
    kept: Tensors
    kept_config: BackboneConfig


class ExportSummary(Record):
    """What `export_backbone` wrote. files: names in the folder, the model card last."""

    name: str
    layout: str
    folder: str
    files: tuple[str, ...]
    licence: str
    num_parameters: int
    settings: dict[str, str]
    notes: tuple[str, ...]


def export_backbone(
    source: str | PathLike[str],
    folder: Path,
    layout: str,
    *,
    weights_folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> ExportSummary:
    """Write a backbone (whatever `load_backbone` takes) to a new folder in a layout of `LAYOUTS`, with its model card.

    official: NAME.pth, a flat state dict of tensors. huggingface, timm: model.safetensors and config.json (for timm
    where it has a model of this size). All: README.md. What is written was read back first and compared.
    Errors: those of loading; UsageError for an unknown layout or a folder that holds something; ConfigError for a
    backbone that the layout cannot hold; ResourceError when it cannot be written.
    """
    convert_to = look_up(LAYOUTS, layout, kind="layout")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fix = "name a new folder: --out FOLDER."
        raise UsageError("exists and is not empty", where=folder, fix=fix)
    backbone, card = load_backbone(source, weights_folder=weights_folder, settings=settings)
    exported = convert_to(backbone.state_dict(), card.config)
    _read_back(exported, layout)
    if card.model is not None:
        note = f"the backbone of a whole model ({card.model.system}); its other parts are not here"
        exported = replace(exported, notes=(note, *exported.notes))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", card.name).strip(".-") or "backbone"
    require_free_space(folder, 5 * card.num_parameters)
    weights = f"{name}.pth" if layout == "official" else "model.safetensors"
    with write_atomic(folder / weights) as temporary:
        if layout == "official":
            torch.save(exported.tensors, temporary)
        else:
            save_file(exported.tensors, temporary, metadata={"format": "pt"})
    files = [weights]
    if exported.config is not None:
        write_json(folder / "config.json", exported.config)
        files.append("config.json")
    text = model_card(name, card, layout, weights, exported.config, settings=exported.settings, notes=exported.notes)
    write_text(folder / "README.md", text)
    return ExportSummary(
        name=name,
        layout=layout,
        folder=str(folder),
        files=(*files, "README.md"),
        licence=card.licence,
        num_parameters=card.num_parameters,
        settings=exported.settings,
        notes=exported.notes,
    )


def to_official(state: Mapping[str, Tensor], config: BackboneConfig) -> Exported:
    """The names of the authors' own files: a flat state dict. Errors: ConfigError for models of timm."""
    tensors = dict(state)
    if isinstance(config, ViTConfig):
        if config.family == "dinov2":
            tensors = _join_gates(_renamed(tensors, [(r"^storage_tokens$", "register_tokens")]), "w12", "w3")
    elif isinstance(config, ConvNeXtConfig):
        tensors |= {f"norms.3.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}  # as the module tree
    else:
        raise _no_place(config, "official")
    return _exported(tensors, None, "official", state, config)


def to_hugging_face(state: Mapping[str, Tensor], config: BackboneConfig) -> Exported:
    """The names and the config.json of transformers' DINOv3ViTModel, DINOv3ConvNextModel and Dinov2Model.

    Names are those of the published files (4.x), which later versions read as well.
    Errors: ConfigError for models of timm and for what the class has no setting for; WeightsError for tensors that have
    no place.
    """
    if isinstance(config, ConvNeXtConfig):
        return _exported(_renamed(state, _CONVNEXT_TO_HUB), convnext_hub_config(config), "huggingface", state, config)
    if not isinstance(config, ViTConfig):
        raise _no_place(config, "huggingface")
    if config.family == "dinov2":
        return _exported(_to_dinov2_of_hub(state), dinov2_hub_config(config), "huggingface", state, config)
    _require_usual_rotation(state, config)
    kept, notes = _without_training_parts(state, config, mask_token=True)
    kept_config = config.model_copy(update={"local_cls_norm": False})
    parts = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    if config.ffn == "mlp":
        parts = {"fc1": "up_proj", "fc2": "down_proj"}
    rules = [*_VIT_TO_HUB, *((rf"\.mlp\.{ours}\.", f".mlp.{theirs}.") for ours, theirs in parts.items())]
    tensors: Tensors = {}
    for key, value in _split_qkv(kept, ("q_proj", "k_proj", "v_proj")).items():
        follows = key.endswith((".bias_mask", "rope_embed.periods"))  # from the configuration
        if not follows and not (key.endswith("k_proj.bias") and config.mask_k_bias):
            tensors[key] = value[None] if key == "mask_token" else value
    if config.rope_dtype != "float32":
        notes.append(_precision_note("transformers", config))
    exported = _exported(_renamed(tensors, rules), vit_hub_config(config), "huggingface", kept, kept_config)
    return replace(exported, notes=(*notes, *exported.notes))


def to_timm(state: Mapping[str, Tensor], config: BackboneConfig) -> Exported:
    """The names of timm's Eva (DINOv3), VisionTransformer (DINOv2) and ConvNeXt, and of models that came from timm.

    The config.json is that of `timm.create_model("local-dir:FOLDER")`; None where timm has no model of this size.
    Errors: ConfigError for what timm's models do not have; WeightsError for tensors that have no place.
    """
    if isinstance(config, TimmConfig):
        return _exported(_renamed(state, [(r"^model\.", "")]), {"architecture": config.model}, "timm", state, config)
    if isinstance(config, ConvNeXtConfig):
        return _exported(_renamed(state, _CONVNEXT_TO_TIMM), timm_config(config), "timm", state, config)
    if not isinstance(config, ViTConfig):
        raise _no_place(config, "timm")
    kept, notes = _without_training_parts(state, config, mask_token=False)
    if config.family == "dinov3":
        tensors = _to_eva(kept, config)
        notes += [_precision_note("timm", config)] if config.rope_dtype != "float32" else []
    else:
        tensors, kept, more = _to_timm_dinov2(kept, config)
        notes += more
    usual = timm_epsilon(config)
    if config.norm_eps != usual:
        notes.append(f"timm's models have an epsilon of {usual:g} in their norms, these weights {config.norm_eps:g}")
    kept_config = config.model_copy(update={"local_cls_norm": False})
    exported = _exported(tensors, timm_config(config), "timm", kept, kept_config)
    return replace(exported, notes=(*notes, *exported.notes))


LAYOUTS: dict[str, Callable[[Mapping[str, Tensor], BackboneConfig], Exported]] = {
    "official": to_official,
    "huggingface": to_hugging_face,
    "timm": to_timm,
}

_VIT_TO_HUB: Rules = [
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
]
_DINOV2_TO_HUB: Rules = [
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.attention."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
]
_VIT_TO_EVA: Rules = [
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
]
_CONVNEXT_PARTS: Rules = [(r"\.dwconv\.", ".depthwise_conv."), (r"\.pwconv([12])\.", r".pointwise_conv\1.")]
_CONVNEXT_TO_HUB: Rules = [
    (r"^norm\.", "layer_norm."),
    (r"^stages\.(\d+)\.(\d+)\.norm\.", r"stages.\1.layers.\2.layer_norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.layers.\2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample_layers."),
    *_CONVNEXT_PARTS,
]
_CONVNEXT_TO_TIMM: Rules = [
    (r"^norm\.", "head.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
]


def _exported(
    tensors: Tensors,
    hub_config: dict[str, Any] | None,
    layout: str,
    kept: Mapping[str, Tensor],
    kept_config: BackboneConfig,
) -> Exported:
    settings = _settings_to_tell(kept_config, layout)
    return Exported(as_float32(tensors, None)[0], hub_config, settings, (), dict(kept), kept_config)


def _settings_to_tell(config: BackboneConfig, layout: str) -> dict[str, str]:
    """What our reader (and any other) would take otherwise, since the files of the layout do not say it."""
    assumed: dict[str, Any] = {}
    told_by_hub = layout == "huggingface"
    if isinstance(config, ConvNeXtConfig) and not told_by_hub:
        assumed = {"norm_eps": 1e-6}
    elif isinstance(config, ViTConfig):
        has_periods = layout == "official" and config.family == "dinov3"
        head_dim = 128 if config.embed_dim == 4096 else 64
        assumed = {"in_planes": 3}
        if not told_by_hub:
            assumed["norm_eps"] = 1e-6 if config.family == "dinov2" else 1e-5
        if not told_by_hub and not has_periods:
            assumed["num_heads"] = config.embed_dim / head_dim
        if config.family == "dinov3":
            assumed["rope_dtype"] = "float32"
            assumed |= {} if told_by_hub else {"rope_base": 100.0}
        elif config.position_grid is not None and config.position_grid[0] != config.position_grid[1]:
            assumed["position_grid"] = None
    values = config.to_json()
    return {
        field: values[field] if isinstance(values[field], str) else json.dumps(values[field])
        for field, value in assumed.items()
        if values[field] != value
    }


def _read_back(exported: Exported, layout: str) -> None:
    """What was made must be what our own reader takes for the same: a file that does not is never written."""
    if isinstance(exported.kept_config, TimmConfig):
        again = convert_timm(exported.tensors, exported.kept_config.model)[0]
    else:
        hub_config = exported.config if layout == "huggingface" else None
        again = convert(exported.tensors, hub_config=hub_config, settings=exported.settings)
    found, kept = again.tensors, exported.kept
    wrong = sorted(found.keys() ^ kept.keys()) or [key for key in kept if not torch.equal(found[key], kept[key].cpu())]
    assert not wrong, f"{layout}: {wrong[:3]} come back changed"


def _without_training_parts(
    state: Mapping[str, Tensor], config: ViTConfig, *, mask_token: bool
) -> tuple[Tensors, list[str]]:
    """The state less what self-supervised training alone reads and biases that are switched off, and what was there."""
    kept, notes = dict(state), list[str]()
    if config.local_cls_norm:
        kept = {key: value for key, value in kept.items() if not key.startswith("local_cls_norm.")}
        notes.append("local_cls_norm, a norm of self-supervised training, is not kept")
    if not mask_token:
        if bool(kept["mask_token"].any()):
            notes.append("the mask token, used only in self-supervised training, is not kept")
        kept["mask_token"] = torch.zeros_like(kept["mask_token"])
    silent = 0
    for key in [key for key in kept if key.endswith(".attn.qkv.bias_mask")]:
        expected = torch.ones_like(kept[key])
        expected[len(expected) // 3 : 2 * len(expected) // 3] = 0
        if not torch.equal(kept[key], expected):
            fix = "use the official layout, which holds it."
            raise WeightsError(f"{key} switches off other biases than those of the keys", fix=fix)
        bias = kept[key.removesuffix("_mask")]
        silent += int(bool((bias * (1 - expected)).any()))
        kept[key.removesuffix("_mask")] = torch.where(expected == 0, torch.zeros_like(bias), bias)
    if silent:
        notes.append(f"biases of keys, which are switched off, are not kept ({silent} blocks)")
    return kept, notes


def _require_usual_rotation(state: Mapping[str, Tensor], config: ViTConfig) -> None:
    head_dim = config.embed_dim // config.num_heads
    usual = rope_periods(head_dim, base=config.rope_base, dtype=config.rope_dtype)
    if not torch.equal(state["rope_embed.periods"].cpu().float(), usual):
        fact = f"its rotary periods are not those of base {config.rope_base:g} in {config.rope_dtype}"
        raise WeightsError(fact, fix="use the official layout, which holds them.")


def _to_eva(state: Mapping[str, Tensor], config: ViTConfig) -> Tensors:
    """timm's DINOv3: queries and values may have biases, keys have none."""
    _require_usual_rotation(state, config)
    if config.qkv_bias and not config.mask_k_bias:
        fix = "use the official or the huggingface layout."
        raise ConfigError("timm's DINOv3 models have no bias of the keys, this backbone has", fix=fix)
    tensors: Tensors = {}
    for key, value in state.items():
        if key.endswith(("mask_token", ".bias_mask", "rope_embed.periods")):
            continue
        if key.endswith(".attn.qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            tensors[f"{stem}q_bias"], _, tensors[f"{stem}v_bias"] = value.chunk(3)
        else:
            tensors[key] = value
    return _renamed(tensors, _VIT_TO_EVA)


def _to_timm_dinov2(state: Tensors, config: ViTConfig) -> tuple[Tensors, Tensors, list[str]]:
    """timm's tensors, what comes back of ours, and notes. With registers the class token holds its own position."""
    assert config.position_grid is not None
    if config.position_grid[0] != config.position_grid[1]:
        grid = f"{config.position_grid[0]} x {config.position_grid[1]}"
        raise ConfigError(f"positions on a grid of {grid} are no square", fix="use the official layout.")
    kept, notes = dict(state), list[str]()
    positions = kept["pos_embed"]
    if config.num_registers:
        kept["cls_token"] = kept["cls_token"] + positions[:, :1]
        kept["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions[:, 1:]), dim=1)
        notes.append("the position of the class token is added to the token itself: timm has no other place for it")
    tensors = {key: value for key, value in kept.items() if key != "mask_token"}
    if config.num_registers:
        tensors["pos_embed"] = kept["pos_embed"][:, 1:]
    return _join_gates(_renamed(tensors, [(r"^storage_tokens$", "reg_token")]), "fc1", "fc2"), kept, notes


def _to_dinov2_of_hub(state: Mapping[str, Tensor]) -> Tensors:
    joined = _join_gates(_split_qkv(state, ("query", "key", "value")), "weights_in", "weights_out")
    return _renamed(joined, _DINOV2_TO_HUB)


def _split_qkv(state: Mapping[str, Tensor], names: tuple[str, str, str]) -> Tensors:
    """Queries, keys and values in layers of their own."""
    result: Tensors = {}
    for key, value in state.items():
        if key.endswith((".attn.qkv.weight", ".attn.qkv.bias")):
            for name, third in zip(names, value.chunk(3), strict=True):
                result[key.replace(".qkv.", f".{name}.")] = third
        else:
            result[key] = value
    return result


def _join_gates(tensors: Tensors, joined: str, out: str) -> Tensors:
    """w1, w2, w3 of DINOv2's gated feed-forward layers as one matrix of gate and value, and the way out."""
    result: Tensors = {}
    for key, value in tensors.items():
        if ".mlp.w1." in key:
            result[key.replace(".w1.", f".{joined}.")] = torch.cat((value, tensors[key.replace(".w1.", ".w2.")]))
        elif ".mlp.w3." in key:
            result[key.replace(".w3.", f".{out}.")] = value
        elif ".mlp.w2." not in key:
            result[key] = value
    return result


def _renamed(tensors: Mapping[str, Tensor], rules: Rules) -> Tensors:
    result: Tensors = {}
    for key, value in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def _precision_note(library: str, config: ViTConfig) -> str:
    return f"{library} computes rotary positions in float32, voxdino in {config.rope_dtype} as these were trained"


def _no_place(config: BackboneConfig, layout: str) -> ConfigError:
    fix = "export it in the timm layout." if isinstance(config, TimmConfig) else "export a backbone with weights."
    return ConfigError(f"the {layout} layout has no place for a {config.summary()}", fix=fix)
