"""Key layouts of published backbones, turned into ours (the official names); complete or refused, never partial.

Four families of files (dossier 5.3, 5.6 and 2.8): official, `teacher`-wrapped training checkpoints, Hugging Face, timm;
and, by its name, any model of the timm library (see timm_bridge).
The configuration follows from the shapes; what shapes cannot say (heads, epsilon, precision) from the file's rotary
periods, a config.json beside it, or the family's published values, and a note says which.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from voxdino.core.errors import WeightsError
from voxdino.core.geometry import format_shape
from voxdino.models.backbones.build import BackboneConfig, build_backbone
from voxdino.models.backbones.rope import rope_periods
from voxdino.models.backbones.timm_bridge import TimmBackbone, TimmConfig
from voxdino.models.backbones.vit import ViTConfig
from voxdino.models.convnext_layouts import convnext_layout, read_convnext

Tensors = dict[str, Tensor]
_MAX_NAMED = 4  # tensors named in one message
_HEADS_OF_TRAINING = ("dino_head.", "ibot_head.")
_TEACHER_PREFIX = "backbone."


@dataclass(frozen=True, eq=False)
class BackboneState:
    """Weights in our names, float32 and finite, with the configuration they fit completely."""

    layout: str
    config: BackboneConfig
    tensors: Tensors
    notes: tuple[str, ...] = ()


@dataclass
class _Draft:
    """What a layout knows when its names are translated."""

    tensors: Tensors
    known: dict[str, Any] = field(default_factory=dict)  # fields of ViTConfig that the shapes do not say
    notes: list[str] = field(default_factory=list)


def convert(
    tensors: Mapping[str, Tensor],
    *,
    hub_config: Mapping[str, Any] | None = None,
    own_config: BackboneConfig | None = None,
    settings: Mapping[str, str] | None = None,
    where: str | PathLike[str] | None = None,
) -> BackboneState:
    """Recognise the layout, rename, infer the configuration, and check that every tensor fits.

    hub_config: the config.json of a Hugging Face folder.
    own_config: the configuration stored in a file of ours, whose names need no translation.
    settings:   fields of the configuration the user knows better, e.g. {"num_heads": "12"}.
    Errors: WeightsError for unknown layouts, missing, unexpected, mis-shaped or non-finite tensors.
    """
    inner, is_teacher, notes = _unwrap_teacher(dict(tensors))
    config: BackboneConfig
    if own_config is not None:
        layout, draft, config = "voxdino", _Draft(inner), own_config.with_settings(settings or {})
    elif (found := convnext_layout(inner)) is not None:
        renamed, shapes = read_convnext(inner, found, hub_config or {}, where)
        layout, draft, config = found, _Draft(renamed), shapes.with_settings(settings or {})
    else:
        layout = _recognise(inner, where)
        draft = _TRANSLATE[layout](inner, dict(hub_config or {}))
        config = _infer_config(draft, layout, is_teacher, settings or {}, where)
    _check_complete(draft.tensors, config, where)
    cast, cast_notes = as_float32(draft.tensors, where)
    name = f"teacher, {layout}" if is_teacher else layout
    return BackboneState(name, config, cast, (*notes, *draft.notes, *cast_notes))


def convert_timm(
    tensors: Mapping[str, Tensor], model: str, *, where: str | PathLike[str] | None = None
) -> tuple[BackboneState, str]:
    """The weights of a model of the timm library, by timm's name and in timm's keys, and their licence as timm says.

    The classifier is left out, and so are the counters of batch norms, which are fixed here.
    Errors: as of `convert`; ResourceError where timm is missing, ConfigError for a model it does not know.
    """
    config = TimmConfig.from_json({"model": model}, where=where)
    backbone = TimmBackbone(config)
    own = {key.removeprefix("model.") for key in backbone.state_dict()}
    head = {key for key in tensors if key.startswith(backbone.classifier_prefixes)} - own
    counters = {key for key in tensors if key.endswith(".num_batches_tracked")}
    kept = {f"model.{key}": value for key, value in tensors.items() if key not in head | counters}
    _check_complete(kept, config, where)
    cast, notes = as_float32(kept, where)
    head_notes = [f"{len(head)} tensors of the classifier dropped"] if head else []
    return BackboneState("timm", config, cast, (*head_notes, *notes)), backbone.licence


def _unwrap_teacher(tensors: Tensors) -> tuple[Tensors, bool, list[str]]:
    """Training checkpoints hold `backbone.*` and heads of self-supervision; the heads are dropped, and that is said."""
    if not any(key.startswith(_TEACHER_PREFIX) for key in tensors):
        return tensors, False, []
    heads = [key for key in tensors if key.startswith(_HEADS_OF_TRAINING)]
    kept = {key.removeprefix(_TEACHER_PREFIX): value for key, value in tensors.items() if key not in set(heads)}
    kinds = ", ".join(sorted({key.partition(".")[0] for key in heads}))
    note = f"{len(heads)} tensors of self-supervision heads dropped ({kinds})"
    return kept, True, [note] if heads else []


def _recognise(tensors: Tensors, where: str | PathLike[str] | None) -> str:
    if "embeddings.patch_embeddings.weight" in tensors:
        return "Hugging Face DINOv3"
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        return "Hugging Face DINOv2"
    if any(key.endswith(".gamma_1") for key in tensors):
        return "timm DINOv3"
    if "rope_embed.periods" in tensors or "storage_tokens" in tensors:
        return "official DINOv3"
    if "pos_embed" in tensors:
        return "official DINOv2" if "mask_token" in tensors else "timm DINOv2"
    raise WeightsError(
        f"no layout we know; it begins with {_name_some(sorted(tensors)) or 'no tensor at all'}",
        where=where,
        fix="give a DINOv3 or DINOv2 backbone in official, teacher, Hugging Face or timm layout; other encoders of "
        "timm by their name: timm:NAME@FILE.",
    )


def _official_dinov3(tensors: Tensors, _: dict[str, Any]) -> _Draft:
    return _Draft(tensors)


def _official_dinov2(tensors: Tensors, _: dict[str, Any]) -> _Draft:
    return _Draft(_split_gates(_rename(tensors, [(r"^register_tokens$", "storage_tokens")]), "w12", "w3"))


def _timm_dinov2(tensors: Tensors, _: dict[str, Any]) -> _Draft:
    draft = _Draft(_split_gates(_rename(tensors, [(r"^reg_token$", "storage_tokens")]), "fc1", "fc2"))
    positions = draft.tensors["pos_embed"]
    if positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        draft.tensors["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
        draft.notes.append("positions without one for the class token: it is part of cls_token here")
    _add_mask_token(draft)
    return draft


def _timm_dinov3(tensors: Tensors, _: dict[str, Any]) -> _Draft:
    draft = _Draft(
        _rename(
            tensors,
            [
                (r"^reg_token$", "storage_tokens"),
                (r"\.gamma_([12])$", r".ls\1.gamma"),
                (r"\.mlp\.fc1_g\.", ".mlp.w1."),
                (r"\.mlp\.fc1_x\.", ".mlp.w2."),
            ],
        )
    )
    for key in [key for key in draft.tensors if ".mlp.w1." in key]:
        old, new = key.replace(".w1.", ".fc2."), key.replace(".w1.", ".w3.")
        if old in draft.tensors:
            draft.tensors[new] = draft.tensors.pop(old)
    for key in [key for key in draft.tensors if key.endswith(".attn.q_bias")]:
        stem = key.removesuffix(".q_bias")
        if f"{stem}.v_bias" in draft.tensors:
            _put_bias(draft.tensors, f"{stem}.qkv", draft.tensors.pop(key), None, draft.tensors.pop(f"{stem}.v_bias"))
    _add_mask_token(draft)
    return draft


def _hugging_face_dinov3(tensors: Tensors, config: dict[str, Any]) -> _Draft:
    renamed = _rename(
        tensors,
        [
            (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
            (r"^embeddings\.register_tokens$", "storage_tokens"),
            (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (r"^(?:model\.)?layer\.", "blocks."),  # 4.x and 5.x
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"\.attention\.", ".attn."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        ],
    )
    gated = any(".mlp.gate_proj." in key for key in renamed)
    parts = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    draft = _Draft(_rename(renamed, [(rf"\.mlp\.{old}\.", f".mlp.{new}.") for old, new in parts.items()]))
    for key in [key for key in draft.tensors if key.endswith(".attn.q_proj.weight")]:
        stem = key.removesuffix(".q_proj.weight")
        names = [f"{stem}.{part}_proj.weight" for part in "qkv"]
        if all(name in draft.tensors for name in names):
            draft.tensors[f"{stem}.qkv.weight"] = torch.cat([draft.tensors.pop(name) for name in names])
        if all(f"{stem}.{part}_proj.bias" in draft.tensors for part in "qv"):
            q, k, v = (draft.tensors.pop(f"{stem}.{part}_proj.bias", None) for part in "qkv")
            assert q is not None and v is not None
            _put_bias(draft.tensors, f"{stem}.qkv", q, k, v)
    mask = draft.tensors.get("mask_token")
    if mask is not None and mask.ndim == 3:
        draft.tensors["mask_token"] = mask[0]
    draft.known = _known_of_hub(config)
    return draft


def _hugging_face_dinov2(tensors: Tensors, config: dict[str, Any]) -> _Draft:
    renamed = _rename(
        tensors,
        [
            (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
            (r"^embeddings\.register_tokens$", "storage_tokens"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^encoder\.layer\.", "blocks."),
            (r"\.attention\.output\.dense\.", ".attn.proj."),
            (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.weights_in\.", ".mlp.w12."),
            (r"\.mlp\.weights_out\.", ".mlp.w3."),
            (r"^layernorm\.", "norm."),
        ],
    )
    draft = _Draft(_split_gates(renamed, "w12", "w3"), _known_of_hub(config))
    for stem in [key.removesuffix(".query.weight") for key in renamed if key.endswith(".attn.query.weight")]:
        for kind in ("weight", "bias"):
            names = [f"{stem}.{part}.{kind}" for part in ("query", "key", "value")]
            if all(name in draft.tensors for name in names):
                draft.tensors[f"{stem}.qkv.{kind}"] = torch.cat([draft.tensors.pop(name) for name in names])
    _add_mask_token(draft)
    return draft


def _known_of_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of transformers says and shapes do not."""
    names = {"num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps", "rope_base": "rope_theta"}
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


_TRANSLATE: dict[str, Callable[[Tensors, dict[str, Any]], _Draft]] = {
    "official DINOv3": _official_dinov3,
    "official DINOv2": _official_dinov2,
    "timm DINOv3": _timm_dinov3,
    "timm DINOv2": _timm_dinov2,
    "Hugging Face DINOv3": _hugging_face_dinov3,
    "Hugging Face DINOv2": _hugging_face_dinov2,
}


def _rename(tensors: Tensors, rules: list[tuple[str, str]]) -> Tensors:
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _split_gates(tensors: Tensors, joined: str, out: str) -> Tensors:
    """Feed-forward layers that hold gate and value in one matrix (DINOv2 giant) become w1, w2, w3."""
    result = dict(tensors)
    for key in [key for key in tensors if key.endswith(f".mlp.{joined}.weight")]:
        stem = key.removesuffix(f".{joined}.weight")
        out_weight = tensors.get(f"{stem}.{out}.weight")
        if out_weight is None or tensors[key].shape[0] != 2 * out_weight.shape[-1]:
            continue  # a plain MLP
        for kind in ("weight", "bias"):
            if f"{stem}.{joined}.{kind}" in result:
                halves = result.pop(f"{stem}.{joined}.{kind}").chunk(2)
                result[f"{stem}.w1.{kind}"], result[f"{stem}.w2.{kind}"] = halves
            if f"{stem}.{out}.{kind}" in result:
                result[f"{stem}.w3.{kind}"] = result.pop(f"{stem}.{out}.{kind}")
    return result


def _put_bias(tensors: Tensors, qkv: str, q: Tensor, k: Tensor | None, v: Tensor) -> None:
    """Join the biases of queries, keys and values; where the keys have none, our mask switches them off."""
    tensors[f"{qkv}.bias"] = torch.cat((q, torch.zeros_like(q) if k is None else k, v))
    if k is None:
        tensors[f"{qkv}.bias_mask"] = torch.cat((torch.ones_like(q), torch.zeros_like(q), torch.ones_like(v)))


def _add_mask_token(draft: _Draft) -> None:
    cls = draft.tensors.get("cls_token")
    if cls is not None and "mask_token" not in draft.tensors:
        draft.tensors["mask_token"] = torch.zeros(1, cls.shape[-1])
        draft.notes.append("this layout has no mask token: set to zero (used only in self-supervised training)")


def _infer_config(
    draft: _Draft, layout: str, is_teacher: bool, settings: Mapping[str, str], where: str | PathLike[str] | None
) -> ViTConfig:
    tensors = draft.tensors
    family = "dinov2" if layout.endswith("DINOv2") else "dinov3"
    dim = _size(tensors, "cls_token", -1, where)
    depth = 1 + max((int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))), default=0)
    swiglu = "blocks.0.mlp.w1.weight" in tensors
    qkv_bias = "blocks.0.attn.qkv.bias" in tensors
    periods = tensors.get("rope_embed.periods")
    fields: dict[str, Any] = {
        "family": family,
        "embed_dim": dim,
        "depth": depth,
        "patch_size": _size(tensors, "patch_embed.proj.weight", -1, where),
        "ffn": "swiglu" if swiglu else "mlp",
        "ffn_hidden": _size(tensors, f"blocks.0.mlp.{'w1' if swiglu else 'fc1'}.weight", 0, where),
        "qkv_bias": qkv_bias,
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in tensors,
        "num_registers": _size(tensors, "storage_tokens", 1, where) if "storage_tokens" in tensors else 0,
        "local_cls_norm": "local_cls_norm.weight" in tensors,
        "norm_eps": 1e-6 if family == "dinov2" else 1e-5,
        **draft.known,
    }
    if "num_heads" not in fields:
        fields["num_heads"] = _infer_heads(dim, periods, settings, where)
    if family == "dinov2":
        fields["position_grid"] = _infer_position_grid(tensors["pos_embed"], settings, where)
    if is_teacher and not qkv_bias and periods is not None and torch.equal(periods, periods.bfloat16().to(periods)):
        fields |= {"norm_eps": 1e-6, "rope_dtype": "bfloat16"}
        draft.notes.append("read as a MedDINOv3 checkpoint: norm_eps 1e-6, rotary positions in bfloat16")
    config = ViTConfig.from_json(fields, where=where).with_settings(settings)
    if layout in ("timm DINOv3", "Hugging Face DINOv3"):  # stores no periods: they follow from base and precision
        head_dim = config.embed_dim // config.num_heads
        tensors["rope_embed.periods"] = rope_periods(head_dim, base=config.rope_base, dtype=config.rope_dtype)
    return config


def _infer_heads(
    dim: int, periods: Tensor | None, settings: Mapping[str, str], where: str | PathLike[str] | None
) -> int:
    """From the number of rotary periods (a quarter of a head's width), else 64 wide heads, 128 in the 7B model."""
    if "num_heads" in settings:
        return 1  # replaced by the setting
    head_dim = 4 * periods.numel() if periods is not None and periods.numel() else 128 if dim == 4096 else 64
    if dim % head_dim:
        fact = f"{dim} channels cannot be split into heads of {head_dim}"
        raise WeightsError(fact, where=where, fix="say how many heads it has: --set num_heads=N.")
    return dim // head_dim


def _infer_position_grid(
    positions: Tensor, settings: Mapping[str, str], where: str | PathLike[str] | None
) -> tuple[int, int]:
    num_patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches and "position_grid" not in settings:
        fact = f"{num_patches} positions are not a square grid"
        raise WeightsError(fact, where=where, fix="say its rows and columns: --set position_grid=[ROWS,COLUMNS].")
    return side, side


def _size(tensors: Tensors, key: str, axis: int, where: str | PathLike[str] | None) -> int:
    tensor = tensors.get(key)
    if tensor is None or tensor.ndim < 2:
        fact = f"{key} is missing" if tensor is None else f"{key} has shape {tuple(tensor.shape)}"
        raise WeightsError(f"not a complete ViT: {fact}", where=where, fix="get the whole file again.")
    return int(tensor.shape[axis])


def _check_complete(tensors: Tensors, config: BackboneConfig, where: str | PathLike[str] | None) -> None:
    fix = "get the complete file of one backbone; nothing is loaded in part."
    what = f"a {config.summary()}"
    if config.num_blocks > len(tensors):  # before a hostile configuration makes us build it
        raise WeightsError(f"does not fit {what}: it holds {len(tensors)} tensors", where=where, fix=fix)
    try:
        with torch.device("meta"):
            expected = {key: value.shape for key, value in build_backbone(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:
        raise WeightsError(f"{what} cannot be built ({error})", where=where, fix=fix) from error
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    misshaped = [
        f"{key} ({format_shape(tensors[key].shape)}, not {format_shape(shape)})"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems = [
        f"{len(keys)} tensors {how}: {_name_some(keys)}"
        for keys, how in ((missing, "missing"), (unexpected, "unexpected"), (misshaped, "of another shape"))
        if keys
    ]
    if problems:
        raise WeightsError(f"does not fit {what}: {'; '.join(problems)}", where=where, fix=fix)


def as_float32(tensors: Tensors, where: str | PathLike[str] | None) -> tuple[Tensors, list[str]]:
    """Each tensor in its own memory, and a note where the numbers were not float32. Errors: WeightsError for others."""
    broken = [key for key, value in tensors.items() if not value.is_floating_point()]
    if broken:
        fact = f"{len(broken)} tensors hold no floating-point numbers: {_name_some(broken)}"
        raise WeightsError(fact, where=where, fix="get the file again from its source.")
    kinds = {str(value.dtype).removeprefix("torch.") for value in tensors.values()} - {"float32"}
    cast = {key: value.to(torch.float32).contiguous() for key, value in tensors.items()}
    seen: set[int] = set()
    for key, value in cast.items():
        storage = value.untyped_storage()
        if storage.nbytes() != 4 * value.numel() or storage.data_ptr() in seen:  # a view, or an alias of another tensor
            cast[key] = value.clone()
        seen.add(storage.data_ptr())
    broken = [key for key, value in cast.items() if not bool(torch.isfinite(value).all())]
    if broken:
        fact = f"{len(broken)} tensors hold NaN or infinity: {_name_some(broken)}"
        raise WeightsError(fact, where=where, fix="get the file again from its source.")
    return cast, [f"cast from {', '.join(sorted(kinds))} to float32"] if kinds else []


def _name_some(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED])
    return shown if len(names) <= _MAX_NAMED else f"{shown} and {len(names) - _MAX_NAMED} more"
