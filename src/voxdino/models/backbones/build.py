"""From a configuration to a backbone, whatever its family: a new family is one file and one line in each table here."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from voxdino.models.backbones.base import Backbone
from voxdino.models.backbones.convnext import ConvNeXt, ConvNeXtConfig
from voxdino.models.backbones.no_backbone import NoBackbone, NoBackboneConfig
from voxdino.models.backbones.pixels import PixelConfig, Pixels
from voxdino.models.backbones.timm_bridge import TimmBackbone, TimmConfig
from voxdino.models.backbones.vit import ViT, ViTConfig

BackboneConfig = Annotated[
    ViTConfig | ConvNeXtConfig | TimmConfig | PixelConfig | NoBackboneConfig, Field(discriminator="family")
]

_FAMILIES: dict[type, Callable[[Any], Backbone]] = {
    ViTConfig: ViT,
    ConvNeXtConfig: ConvNeXt,
    TimmConfig: TimmBackbone,
    PixelConfig: Pixels,
    NoBackboneConfig: NoBackbone,
}


def build_backbone(config: BackboneConfig) -> Backbone:
    """A backbone with random weights. Errors: ResourceError where its family needs a package that is missing."""
    return _FAMILIES[type(config)](config)


def backbone_from_state(config: BackboneConfig, state: Mapping[str, Tensor]) -> Backbone:
    """A backbone in eval mode that holds the tensors of a complete state (see voxdino.models.layouts), uncopied."""
    with torch.device("meta"):
        backbone = build_backbone(config)
    backbone.load_state_dict(state, strict=True, assign=True)
    return backbone.eval()
