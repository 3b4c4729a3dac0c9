"""The model: input builder, backbone, decoder; from crops to logits per voxel."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import CheckpointError, ConfigError
from voxdino.core.geometry import format_shape
from voxdino.core.records import Record
from voxdino.models.backbones.vit import ViT
from voxdino.models.decoders.base import Decoder
from voxdino.models.decoders.tpa_sad import PUBLISHED_SCALES, Pyramid
from voxdino.models.features import Features, Prediction
from voxdino.models.inputs import InputBuilder
from voxdino.models.lora import add_lora
from voxdino.models.registry import DECODERS, INPUT_BUILDERS, default_taps, look_up

Adaptation = Literal["frozen", "lora", "last_k", "full"]


class ModelConfig(Record):
    """All that is needed to build a model around a backbone; stored in every run.

    backbone:      source of the weights, as load_backbone takes it.
    licence:       of those weights; the trained model inherits it.
    taps:          blocks (0-based) the decoder reads; None: the last ones of `default_taps`.
    magnification: network pixels per voxel; crops are enlarged by it and rounded up to whole patches.
    last_k:        blocks trained under adaptation "last_k" (the final norm with them).
    pyramid, pyramid_scales: of the decoder "tpa_sad"; see there.
    rope_rescale:  DINOv3's position augmentation in training; never in a frozen backbone.
    """

    backbone: str
    licence: str | None = None
    taps: tuple[int, ...] | None = None
    tap_norm: bool = True
    input_builder: str = "repeat"
    context_slices: int = 0
    num_channels: int = 1
    magnification: float = 1.0
    decoder: str = "tpa_sad"
    decoder_width: int = 128
    pyramid: Pyramid = "x8_x4_x2_x1"
    pyramid_scales: tuple[int, ...] = PUBLISHED_SCALES
    num_outputs: int
    adaptation: Adaptation = "frozen"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    last_k: int = 0
    drop_path: float = 0.0
    rope_rescale: float | None = None
    gradient_checkpointing: bool = False


def build_segmenter(config: ModelConfig, backbone: ViT) -> "Segmenter":
    """Put a model together; the backbone is adapted in place. Errors: ConfigError for what does not go together."""
    inputs = look_up(INPUT_BUILDERS, config.input_builder, kind="input builder")(config.num_channels)
    if inputs.context_slices != config.context_slices:
        raise ConfigError(
            f"input builder {config.input_builder!r} reads {inputs.context_slices} neighbouring slices each side, "
            f"but context_slices is {config.context_slices}",
            fix=f"set context_slices to {inputs.context_slices}, or choose another input builder.",
        )
    kind = look_up(DECODERS, config.decoder, kind="decoder")
    taps = config.taps or default_taps(backbone.depth)[-kind.num_taps :]
    if len(taps) < kind.num_taps:
        fix = f"give {kind.num_taps} taps, e.g. {default_taps(backbone.depth)[-kind.num_taps :]}."
        raise ConfigError(f"decoder {config.decoder!r} reads {kind.num_taps} taps, {len(taps)} are given", fix=fix)
    if max(taps) >= backbone.depth or min(taps) < 0:
        fix = f"choose from 0 to {backbone.depth - 1}, e.g. {default_taps(backbone.depth)}."
        raise ConfigError(f"taps {taps} do not fit a backbone of {backbone.depth} blocks", fix=fix)
    if not config.magnification > 0:
        raise ConfigError(f"magnification is {config.magnification}", fix="give a number above 0, e.g. 1.0.")
    read = inspect.signature(kind).parameters
    settings = {name: value for name, value in config if name in read and name != "num_outputs"}
    decoder = kind(embed_dims=(backbone.embed_dim,) * kind.num_taps, num_outputs=config.num_outputs, **settings)
    _adapt(backbone, config)
    return Segmenter(config, inputs, backbone, decoder, taps)


def _adapt(backbone: ViT, config: ModelConfig) -> None:
    """Decide which weights of the backbone train."""
    frozen = config.adaptation == "frozen"
    if frozen and (config.drop_path or config.rope_rescale is not None):
        fix = "leave drop_path at 0 and rope_rescale unset, or choose adaptation lora, last_k or full."
        raise ConfigError("drop_path and rope_rescale have no effect on a frozen backbone", fix=fix)
    if (config.adaptation == "last_k") != (config.last_k > 0) or config.last_k > backbone.depth:
        fix = f"adaptation last_k with last_k from 1 to {backbone.depth}; any other with last_k 0."
        raise ConfigError(f"adaptation {config.adaptation!r} does not go with last_k {config.last_k}", fix=fix)
    if not 0 <= config.drop_path < 1 or (config.rope_rescale is not None and config.rope_rescale < 1):
        fix = "drop_path lies in [0, 1), rope_rescale is at least 1."
        raise ConfigError(
            f"drop_path {config.drop_path} or rope_rescale {config.rope_rescale} is out of range", fix=fix
        )
    backbone.drop_path, backbone.rope_rescale = config.drop_path, config.rope_rescale
    backbone.gradient_checkpointing = config.gradient_checkpointing
    backbone.requires_grad_(config.adaptation == "full")
    if config.adaptation == "full":
        for unused in (backbone.mask_token, *_parameters_of(backbone.local_cls_norm)):
            unused.requires_grad_(False)
    elif config.adaptation == "last_k":
        for module in (*backbone.blocks[-config.last_k :], backbone.norm):
            module.requires_grad_(True)
    elif config.adaptation == "lora":
        add_lora(backbone, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)


def _parameters_of(module: nn.Module | None) -> tuple[nn.Parameter, ...]:
    return () if module is None else tuple(module.parameters())


class Segmenter(nn.Module):
    """Crops (B, C, D + 2 k, H, W) to logits (B, K, D, H, W); k neighbouring slices each side give context only."""

    def __init__(
        self, config: ModelConfig, inputs: InputBuilder, backbone: ViT, decoder: Decoder, taps: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.config, self.taps = config, taps
        self.inputs, self.backbone, self.decoder = inputs, backbone, decoder
        self.train()

    @property
    def cacheable(self) -> bool:
        """Features of an image never change: backbone frozen and no trained input builder before it."""
        return self.config.adaptation == "frozen" and not self.inputs.trainable

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for what trains; frozen blocks of the backbone stay in eval mode whatever is asked."""
        super().train(mode)
        if self.config.adaptation in ("frozen", "last_k"):
            self.backbone.eval()
            for block in self.backbone.blocks[self.backbone.depth - self.config.last_k :]:
                block.train(mode)
        return self

    def network_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Pixels the backbone sees for a crop of `size` voxels: magnified, rounded up to whole patches."""
        patch = self.backbone.patch_size
        rows, columns = (max(1, math.ceil(n * self.config.magnification / patch - 1e-6)) * patch for n in size)
        return rows, columns

    def encode(self, image: Float[Tensor, "B C D H W"], *, slices_at_once: int | None = None) -> Features:
        """Features of the B * D slices, each resized bilinearly (outer edges agreeing) to `network_size`.

        slices_at_once: bounds the memory; the result is the same.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cacheable):
            slices = self.inputs(image)
            parts = [self._encode(part) for part in slices.split(slices_at_once or len(slices))]
        if len(parts) == 1:
            return parts[0]
        maps = tuple(torch.cat(same_tap) for same_tap in zip(*(part.maps for part in parts), strict=True))
        return Features(maps, torch.cat([part.cls_token for part in parts]), parts[0].patch_size)

    def decode(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "S K H W"]:
        """Logits of every slice in float32, from the decoder's own grid straight to `size` = (H, W)."""
        logits: Tensor = self.decoder(features, size)
        return logits

    def forward(self, image: Float[Tensor, "B C D H W"]) -> Prediction:
        logits = self.decode(self.encode(image), (image.shape[3], image.shape[4]))  # (B * D, K, H, W)
        return Prediction(logits.reshape(len(image), -1, *logits.shape[1:]).transpose(1, 2))

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that trains: decoder, adapters, unfrozen parts of the backbone, a learned input projection."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `trainable_state` gave. Errors: CheckpointError naming the first tensors that do not fit."""
        own = {name: value for name, value in self.named_parameters() if value.requires_grad}
        problems = [f"{name} is missing" for name in own if name not in state]
        problems += [f"{name} is unexpected" for name in state if name not in own]
        problems += [
            f"{name} is {format_shape(state[name].shape)}, not {format_shape(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            fix = "use the configuration the weights were trained with."
            raise CheckpointError(f"does not fit this model: {'; '.join(problems[:3])}{more}", fix=fix)
        for name, value in own.items():
            value.copy_(state[name])

    def parameter_groups(
        self, lr: float, *, backbone_lr_scale: float = 0.1, weight_decay: float = 0.01, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser, in an order that depends on the configuration only.

        New weights (decoder, adapters, input projection) learn at `lr`; pretrained ones at lr * backbone_lr_scale *
        layer_decay ** (blocks above them). Biases, norms, scales, gates and tokens are not decayed.
        """
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, value in self.named_parameters():
            if not value.requires_grad:
                continue
            scale = self._lr_scale(name, backbone_lr_scale, layer_decay)
            decays = value.ndim > 1 and not name.endswith(("_token", "_tokens", "pos_embed"))
            group = groups.setdefault(
                (scale, decays),
                {"params": [], "names": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0},
            )
            group["params"].append(value)
            group["names"].append(name)
        return list(groups.values())

    def _lr_scale(self, name: str, backbone_lr_scale: float, layer_decay: float) -> float:
        parts = name.split(".")
        if parts[0] != "backbone" or "adapter" in parts:
            return 1.0
        depth = self.backbone.depth
        above = depth - 1 - int(parts[2]) if parts[1] == "blocks" else 0 if parts[1] == "norm" else depth
        return backbone_lr_scale * layer_decay**above

    def _encode(self, slices: Float[Tensor, "S 3 H W"]) -> Features:
        height, width = slices.shape[2:]
        size = self.network_size((height, width))
        if size != (height, width):
            shrinks = size[0] < height or size[1] < width
            slices = F.interpolate(slices, size=size, mode="bilinear", antialias=shrinks)
        features: Features = self.backbone(slices, taps=self.taps, tap_norm=self.config.tap_norm)
        return features
