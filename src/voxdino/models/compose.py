"""Composition: backbone x input builder x adapter x decoder x detail stream, chosen freely, checked together.

What cannot work is refused with the reason and the nearest combination that can.
"""

import inspect
from typing import Any

from pydantic import TypeAdapter, ValidationError

from voxdino.core.errors import ConfigError
from voxdino.core.records import nearest
from voxdino.models.backbones.base import Ability, Backbone
from voxdino.models.backbones.depth_adapter import add_depth_adapters
from voxdino.models.backbones.vit import ViT
from voxdino.models.decoders.base import Decoder
from voxdino.models.inputs import InputBuilder
from voxdino.models.lora import add_lora
from voxdino.models.registry import DECODERS, INPUT_BUILDERS, look_up
from voxdino.models.segmenter import ModelConfig, Segmenter


def build_segmenter(config: ModelConfig, backbone: Backbone) -> Segmenter:
    """Put a model together; the backbone is adapted in place. Errors: ConfigError for what does not go together."""
    inputs = look_up(INPUT_BUILDERS, config.input_builder, kind="input builder")(config.num_channels)
    if inputs.context_slices != config.context_slices:
        raise ConfigError(
            f"input builder {config.input_builder!r} reads {inputs.context_slices} neighbouring slices each side, "
            f"but context_slices is {config.context_slices}",
            fix=f"set context_slices to {inputs.context_slices}, or choose another input builder.",
        )
    if not config.magnification > 0:
        raise ConfigError(f"magnification is {config.magnification}", fix="give a number above 0, e.g. 1.0.")
    kind = look_up(DECODERS, config.decoder, kind="decoder")
    _require_whole(config, kind, backbone, inputs)
    taps = _taps(config, kind, backbone)
    num_outputs = None if config.detail != "none" else config.num_outputs
    settings = _settings_of(kind, config)
    try:
        decoder = kind(embed_dims=backbone.embed_dims(taps), num_outputs=num_outputs, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        told = f"decoder {config.decoder!r} cannot be built with {settings} ({error})"
        raise ConfigError(
            told, fix="voxdino list decoders; see the decoder's documentation for its settings."
        ) from error
    _adapt(backbone, config, inputs, max(taps, default=-1))
    return Segmenter(config, inputs, backbone, decoder, taps)


def _settings_of(kind: type[Decoder], config: ModelConfig) -> dict[str, Any]:
    """What the decoder's constructor reads of the configuration, by name."""
    read = [name for name in inspect.signature(kind).parameters if name not in ("embed_dims", "num_outputs")]
    for name, value in config.decoder_settings.items():
        if name not in read:
            told = f"decoder {config.decoder!r} has no setting {name!r}.{nearest(name, read)}"
            raise ConfigError(told, fix=f"it has: {', '.join(read) or 'none'}.")
        wanted = inspect.signature(kind).parameters[name].annotation
        try:
            TypeAdapter(wanted).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            told = f"decoder {config.decoder!r}: {name} is {value!r}"
            raise ConfigError(told, where="decoder_settings", fix=f"{problem}.") from error
    return {name: value for name, value in config if name in read and value is not None} | config.decoder_settings


def sees_slab(decoder: str, detail: str, depth_adapter: int) -> bool:
    """Whether any part of such a model sees several slices together."""
    in_3d = 2 not in look_up(DECODERS, decoder, kind="decoder").num_dims
    return in_3d or detail == "volume" or depth_adapter > 0


def _taps(config: ModelConfig, kind: type[Decoder], backbone: Backbone) -> tuple[int, ...]:
    """The last ones that the decoder reads, of those configured or of the backbone's usual ones."""
    usual = backbone.default_taps()
    taps = usual if config.taps is None else config.taps
    if len(taps) < kind.num_taps:
        fix = f"give {kind.num_taps} taps, e.g. {usual[-kind.num_taps :]}."
        if len(usual) < kind.num_taps:
            fix = f"this backbone has {len(usual)} taps: choose a decoder that reads no more, such as linear."
        raise ConfigError(f"decoder {config.decoder!r} reads {kind.num_taps} taps, {len(taps)} are given", fix=fix)
    if any(not 0 <= tap < backbone.depth for tap in taps):
        fix = f"choose from 0 to {backbone.depth - 1}, e.g. {usual}."
        raise ConfigError(f"taps {taps} do not fit a backbone of {backbone.depth} blocks", fix=fix)
    return taps[len(taps) - kind.num_taps :]


def _require_whole(config: ModelConfig, kind: type[Decoder], backbone: Backbone, inputs: InputBuilder) -> None:
    """Refuse what would train but could not work, or would be without effect."""
    name = config.decoder
    if kind.num_taps == 0:
        asked = [
            setting
            for setting, given in (
                (f"detail {config.detail!r}", config.detail != "none"),
                (f"adaptation {config.adaptation!r}", config.adaptation != "frozen"),
                ("a depth_adapter", config.depth_adapter > 0),
                ("blank_features", config.blank_features),
                (f"backbone {config.backbone!r}", backbone.depth > 0),
            )
            if given
        ]
        if asked:
            fix = "use backbone none, adaptation frozen and detail none with it, or a decoder that reads features."
            raise ConfigError(f"decoder {name!r} reads the image alone; {asked[0]} does not go with it", fix=fix)
    elif backbone.depth == 0:
        fix = "choose a backbone (voxdino list backbones), or decoder unet_2d or unet_3d."
        raise ConfigError(f"decoder {name!r} reads features, but there is no backbone", fix=fix)
    if config.slab > 1 and not sees_slab(name, config.detail, config.depth_adapter):
        fix = "set slab to 1, or choose a 3-D decoder, detail volume or a depth_adapter."
        raise ConfigError(f"slab is {config.slab}, but nothing in the model sees several slices", fix=fix)
    if config.blank_features:
        _require_control(config, kind, inputs)


def _require_control(config: ModelConfig, kind: type[Decoder], inputs: InputBuilder) -> None:
    """Refuse what blank_features would hide, and a model that sees nothing beside the features."""
    hidden = [
        (f"adaptation {config.adaptation!r} trains", config.adaptation != "frozen", "choose adaptation frozen"),
        ("a depth_adapter trains in", config.depth_adapter > 0, "set depth_adapter to 0"),
        (f"input builder {config.input_builder!r} trains before", inputs.trainable, "choose one without weights"),
    ]
    for what, given, fix in hidden:
        if given:
            fix = f"{fix} for the control without features."
            raise ConfigError(f"{what} a backbone that blank_features hides", fix=fix)
    if config.detail == "none" and not kind.reads_image:
        fix = "give it a detail stream (detail=slices or volume); without one, compare with backbone random:NAME."
        raise ConfigError("blank_features leaves this model nothing to see: it would answer all images alike", fix=fix)


def _adapt(backbone: Backbone, config: ModelConfig, inputs: InputBuilder, last_tap: int) -> None:
    """Decide which weights of the backbone train: none of parts that no tap reads."""
    frozen = config.adaptation == "frozen"
    if frozen and (config.drop_path or config.rope_rescale is not None):
        fix = "leave drop_path at 0 and rope_rescale unset, or choose adaptation lora, last_k or full."
        raise ConfigError("drop_path and rope_rescale have no effect on a frozen backbone", fix=fix)
    if (config.adaptation == "last_k") != (config.last_k > 0) or config.last_k > backbone.depth:
        fix = f"adaptation last_k with last_k from 1 to {backbone.depth}; any other with last_k 0."
        raise ConfigError(f"adaptation {config.adaptation!r} does not go with last_k {config.last_k}", fix=fix)
    if 0 < config.last_k < backbone.depth - last_tap:
        fix = f"set last_k to {backbone.depth - last_tap} or more, or taps that end at {backbone.depth - 1}."
        raise ConfigError(f"last_k {config.last_k} trains blocks after the last tap {last_tap}", fix=fix)
    if not 0 <= config.drop_path < 1 or (config.rope_rescale is not None and config.rope_rescale < 1):
        fix = "drop_path lies in [0, 1), rope_rescale is at least 1."
        raise ConfigError(
            f"drop_path {config.drop_path} or rope_rescale {config.rope_rescale} is out of range", fix=fix
        )
    asked: dict[Ability, bool] = {
        "lora": config.adaptation == "lora",
        "depth_adapter": config.depth_adapter > 0,
        "drop_path": config.drop_path > 0,
        "rope_rescale": config.rope_rescale is not None,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    for ability in (ability for ability, wanted in asked.items() if wanted and ability not in backbone.abilities):
        able = (
            f"it can do: {', '.join(sorted(backbone.abilities)) or 'none of them'}; adaptation frozen, last_k or full."
        )
        raise ConfigError(f"{ability} does not go with backbone {config.backbone}", fix=able)
    if inputs.learns_embedding and not isinstance(backbone, ViT):
        fix = "choose an input builder without an embedding of its own, such as neighbours."
        raise ConfigError(f"input builder {config.input_builder!r} needs a vision transformer", fix=fix)
    backbone.drop_path, backbone.rope_rescale = config.drop_path, config.rope_rescale
    backbone.gradient_checkpointing = config.gradient_checkpointing
    backbone.requires_grad_(config.adaptation == "full")
    if config.adaptation == "full":
        for unused in backbone.idle_parameters():
            unused.requires_grad_(False)
    elif config.adaptation == "last_k":
        for module in backbone.tail(config.last_k):
            module.requires_grad_(True)
    if isinstance(backbone, ViT):
        if config.adaptation == "lora":
            add_lora(backbone, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
        if config.depth_adapter:
            add_depth_adapters(backbone, width=config.depth_adapter)
        if inputs.learns_embedding or inputs.num_planes != backbone.config.in_planes:
            backbone.widen_input(inputs.num_planes)
    if last_tap < backbone.depth - 1:
        for name, parameter in backbone.named_parameters():
            if backbone.level(name) > last_tap and not name.startswith("norm."):  # the norm serves every tap
                parameter.requires_grad_(False)
