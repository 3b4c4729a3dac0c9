"""The model that classifies: slices through a backbone, their tokens pooled, one linear layer."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.labels import LabelKind
from voxdino.models.backbones.base import Backbone
from voxdino.models.compose import build_segmenter
from voxdino.models.decoders.linear import LinearDecoder
from voxdino.models.heads.classifier import ClassificationHead
from voxdino.models.segmenter import ModelConfig, Segmenter


class Classifier(nn.Module):
    """Images (B, C, D, H, W) to logits (B, O); a picture has D = 1.

    Of each slice the head sees the class token and the mean of the patch tokens, less `mean`, divided by `sd`.
    """

    def __init__(self, encoder: Segmenter, head: ClassificationHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        width = head.pool.embed_dim
        self.mean, self.sd = nn.Buffer(torch.zeros(width)), nn.Buffer(torch.ones(width))

    def bags(self, image: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B D E2"]:
        """What the head reads, before it is standardised."""
        features = self.encoder.encode(image)
        tokens = torch.cat((features.cls_token, features.maps[-1].flatten(2).mean(2)), dim=1).float()  # (B * D, 2 E)
        return tokens.reshape(len(image), -1, tokens.shape[1])

    def forward(self, image: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B O"]:
        logits: Tensor = self.head((self.bags(image) - self.mean) / self.sd)
        return logits

    def parameter_groups(self, lr: float, *, backbone_lr_scale: float, weight_decay: float) -> list[dict[str, Any]]:
        """As `Segmenter.parameter_groups`, and the head, which learns at `lr`."""
        groups = self.encoder.parameter_groups(lr, backbone_lr_scale=backbone_lr_scale, weight_decay=weight_decay)
        names, values = zip(*self.head.named_parameters(), strict=True)
        head = {"params": list(values), "names": list(names), "lr": lr, "weight_decay": weight_decay}
        return [*groups, head]


def build_classifier(
    config: ModelConfig, backbone: Backbone, *, num_classes: int, kind: LabelKind, pooling: str
) -> Classifier:
    """Put a classifier together; the backbone is adapted in place. Errors: ConfigError for what does not fit."""
    encoder = build_segmenter(config, backbone)
    dims = backbone.embed_dims(encoder.taps)
    encoder.decoder = LinearDecoder(embed_dims=dims, num_outputs=None)  # nothing is left of it that could train
    head = ClassificationHead(
        embed_dim=cls_dim(backbone) + dims[-1], num_classes=num_classes, kind=kind, pooling=pooling
    )
    return Classifier(encoder, head)


def cls_dim(backbone: Backbone) -> int:
    """Channels of the class token, which are those of the deepest map."""
    return backbone.embed_dims((backbone.depth - 1,))[0]


def encoder_config(
    backbone: str, licence: str | None, *, num_channels: int, settings: dict[str, Any] | None = None
) -> ModelConfig:
    """Of an encoder for whole images of any channels; settings: fields of ModelConfig that adapt the backbone."""
    builder = {1: "repeat", 3: "rgb"}.get(num_channels, "channels")
    fixed: dict[str, Any] = {"decoder": "linear", "num_outputs": 1, "input_builder": builder}
    return ModelConfig(backbone=backbone, licence=licence, num_channels=num_channels, **fixed, **(settings or {}))


def probabilities(model: Classifier, logits: Sequence[Tensor], temperature: float) -> Float[Tensor, "N K"]:
    """Of batches of logits, divided by the temperature."""
    return model.head.probabilities(torch.cat([one.float().cpu() for one in logits]) / temperature)
