"""The model: input builder, backbone, decoder; from crops to logits per voxel."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from voxdino.core.errors import CheckpointError
from voxdino.core.geometry import format_shape
from voxdino.core.records import Record
from voxdino.models.backbones.base import Backbone
from voxdino.models.decoders.base import Decoder
from voxdino.models.decoders.tpa_sad import PUBLISHED_SCALES, Pyramid
from voxdino.models.detail import DetailStream, GatedFusion, Refinement, resize
from voxdino.models.features import Features, Prediction, slices_to_volume
from voxdino.models.inputs import InputBuilder

DecoderSetting = bool | int | float | str | tuple[int, ...] | tuple[float, ...]
Adaptation = Literal["frozen", "lora", "last_k", "full"]


class ModelConfig(Record):
    """All that is needed to build a model around a backbone; stored in every run.

    backbone:      source of the weights, as load_backbone takes it.
    licence:       of those weights; the trained model inherits it.
    taps:          blocks (0-based) the decoder reads; None: the last ones of the backbone's `default_taps`.
    magnification: network pixels per voxel; crops are enlarged by it and rounded up to whole patches.
    detail:        a convolutional stream beside the backbone that sees every voxel and refines the decoder's features
                   (DINO-Med3D, dossier 1.4): none, slice by slice, or in 3-D.
    detail_width:  channels of its finest level.
    depth_adapter: width of the adapters along the slice axis in every block; 0: none.
    slab:          slices that are seen together by what works in 3-D.
    blank_features: the control: what the backbone says is replaced by zeros.
    slices_at_once: most slices in the backbone at a time; bounds the memory of long slabs.
    last_k:        blocks trained under adaptation "last_k" (the final norm with them).
    pyramid, pyramid_scales: of the decoder "tpa_sad"; see there.
    decoder_width: channels of the decoder; None: as its constructor says, which is as published.
    decoder_settings: further settings of a decoder, by name.
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
    decoder_width: int | None = None
    pyramid: Pyramid = "x8_x4_x2_x1"
    pyramid_scales: tuple[int, ...] = PUBLISHED_SCALES
    decoder_settings: dict[str, DecoderSetting] = Field(default_factory=dict)
    num_outputs: int
    adaptation: Adaptation = "frozen"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    last_k: int = 0
    drop_path: float = 0.0
    rope_rescale: float | None = None
    gradient_checkpointing: bool = False
    detail: Literal["none", "slices", "volume"] = "none"
    detail_width: int = 16
    depth_adapter: int = 0
    slab: int = 1
    blank_features: bool = False
    slices_at_once: int | None = None


class Segmenter(nn.Module):
    """Crops (B, C, D + 2 k, H, W) to logits (B, K, D, H, W); k neighbouring slices each side give context only.

    Input builder, backbone and decoder, and beside them, where configured, a detail stream: the decoder's features are
    then fused with its coarsest map and refined with its finer ones, in place of the decoder's own classifier.
    """

    def __init__(
        self, config: ModelConfig, inputs: InputBuilder, backbone: Backbone, decoder: Decoder, taps: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.config, self.taps = config, taps
        self.inputs, self.backbone, self.decoder = inputs, backbone, decoder
        self.detail: DetailStream | None = None
        self.fuse: GatedFusion | None = None
        self.refine: Refinement | None = None
        if config.detail != "none":
            in_3d, width, base = config.detail == "volume", decoder.hidden_width, config.detail_width
            self.detail = DetailStream(num_channels=config.num_channels, width=width, base=base, volumetric=in_3d)
            self.fuse = None if decoder.fuses_detail else GatedFusion(width)
            self.refine = Refinement(
                hidden_width=width,
                num_outputs=config.num_outputs,
                base=base,
                widths=(4 * base, 2 * base),
                volumetric=in_3d,
            )
        self.train()

    @property
    def cacheable(self) -> bool:
        """Features of an image never change: backbone frozen, no adapters in it, no trained input builder before it."""
        config = self.config
        changing = config.adaptation != "frozen" or config.depth_adapter > 0 or self.inputs.trainable
        return self.backbone.depth > 0 and not changing

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for what trains; frozen blocks of the backbone stay in eval mode whatever is asked."""
        super().train(mode)
        if self.config.adaptation in ("frozen", "last_k"):
            self.backbone.eval()
            for module in self.backbone.tail(self.config.last_k) if self.config.last_k else ():
                module.train(mode)
        return self

    def network_size(self, size: tuple[int, int], *, magnify: float = 1.0) -> tuple[int, int]:
        """Pixels the backbone sees for a crop of `size` voxels: magnified, rounded up to whole patches."""
        patch, times = self.backbone.patch_size, self.config.magnification * magnify
        rows, columns = (max(1, math.ceil(n * times / patch - 1e-6)) * patch for n in size)
        return rows, columns

    @property
    def classifier(self) -> nn.Module:
        """The last layer: features of voxels to logits. Only linear interpolation comes after it."""
        return self.decoder.to_logits if self.refine is None else self.refine.to_logits

    @property
    def reads_image(self) -> bool:
        """The decoding half needs the voxels beside the features."""
        return self.detail is not None or self.decoder.reads_image

    @property
    def volumetric(self) -> bool:
        """The decoder sees the slices of a slab together."""
        return 2 not in self.decoder.num_dims

    def encode(
        self, image: Float[Tensor, "B C Dk H W"], *, slices_at_once: int | None = None, magnify: float = 1.0
    ) -> Features:
        """Features of the B * D slices, each resized bilinearly (outer edges agreeing) to `network_size`.

        slices_at_once: bounds the memory; the result is the same. Default: as configured.
        """
        num_slices = image.shape[2] - 2 * self.inputs.context_slices
        size = self.network_size((image.shape[3], image.shape[4]), magnify=magnify)
        if self.config.blank_features:
            return self._blank(image, len(image) * num_slices, size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cacheable):
            slices = self.inputs(image)
            if size != slices.shape[2:]:
                shrinks = size[0] < slices.shape[2] or size[1] < slices.shape[3]
                slices = F.interpolate(slices, size=size, mode="bilinear", antialias=shrinks)
            features: Features = self.backbone(
                slices,
                taps=self.taps,
                tap_norm=self.config.tap_norm,
                num_slices=num_slices,
                images_at_once=slices_at_once or self.config.slices_at_once,
            )
        return features

    def _blank(self, image: Tensor, num_images: int, size: tuple[int, int]) -> Features:
        """Zeros in the shape of features, at no cost."""
        patch = self.backbone.patch_size
        dims = self.backbone.embed_dims(self.taps)
        maps = tuple(image.new_zeros(num_images, dim, size[0] // patch, size[1] // patch) for dim in dims)
        return Features(maps, image.new_zeros(num_images, dims[-1]), (patch, patch))

    def decode(
        self, features: Features, shape: tuple[int, int, int], image: Float[Tensor, "B C D H W"] | None = None
    ) -> Float[Tensor, "B K D H W"]:
        """Logits in float32 of slabs of `shape` = (D, H, W), from the decoder's own grid straight to the voxels.

        image: the slab's voxels, without context slices; for models that read them (`reads_image`).
        """
        num_slices = shape[0]
        if self.decoder.reads_image:
            scores: Tensor = self.decoder(features, shape if self.volumetric else shape[1:], image=image)
            return scores if self.volumetric else slices_to_volume(scores, num_slices)
        if self.volumetric:
            features = features.as_volume(num_slices)
        logits: Tensor
        if self.detail is not None:
            assert image is not None
            logits = self._refined(features, image, self.detail).float()
        elif self.volumetric:
            logits = self.decoder(features, shape)
        else:
            logits = slices_to_volume(self.decoder(features, shape[1:]), num_slices)
        return logits

    def forward(self, image: Float[Tensor, "B C Dk H W"], magnify: float = 1.0) -> Prediction:
        """magnify: so many times the configured magnification; a detail stream stays at the voxels."""
        centre = self.without_context(image)
        depth, rows, columns = centre.shape[2:]
        return Prediction(self.decode(self.encode(image, magnify=magnify), (depth, rows, columns), centre))

    def without_context(self, image: Float[Tensor, "B C Dk H W"]) -> Float[Tensor, "B C D H W"]:
        """The slices that get logits."""
        context = self.inputs.context_slices
        return image[:, :, context : image.shape[2] - context]

    def _refined(
        self, features: Features, image: Float[Tensor, "B C D H W"], detail: DetailStream
    ) -> Float[Tensor, "B K D H W"]:
        """Logits from the decoder's features and the detail stream's; in 2-D every slice is a volume of its own."""
        alone, num_slices = self.config.detail == "slices", image.shape[2]
        maps = detail(apart(image) if alone else image)
        if self.decoder.fuses_detail:
            hidden = self.decoder.hidden(features, together(maps.quarter, num_slices) if alone else maps.quarter)
        else:
            hidden = self.decoder.hidden(features)
        if not self.volumetric:
            hidden = slices_to_volume(hidden, num_slices)
        hidden = apart(hidden) if alone else hidden
        if self.fuse is not None:
            hidden = self.fuse(hidden, resize(maps.quarter, hidden))
        assert self.refine is not None
        logits: Tensor = self.refine(hidden, maps)
        return together(logits, num_slices) if alone else logits

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
        if parts[0] != "backbone" or {"adapter", "depth_adapter"} & set(parts):
            return 1.0
        above = self.backbone.depth - 1 - self.backbone.level(name.removeprefix("backbone."))
        return backbone_lr_scale * layer_decay**above


def apart(x: Float[Tensor, "B X D H W"]) -> Float[Tensor, "S X 1 H W"]:
    """Every slice as a volume of its own."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def together(x: Float[Tensor, "S X 1 H W"], num_slices: int) -> Float[Tensor, "B X D H W"]:
    """What `apart` took apart."""
    return slices_to_volume(x[:, :, 0], num_slices)
