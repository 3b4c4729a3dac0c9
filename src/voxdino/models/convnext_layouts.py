"""Key layouts of DINOv3's ConvNeXts, turned into ours: the official names less `norms.3`, which repeats `norm`."""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from voxdino.core.errors import WeightsError
from voxdino.models.backbones.convnext import ConvNeXtConfig

# What a layout's files hold and no other layout's; a config.json of Hugging Face may give the epsilon.
MARKS = {
    "official ConvNeXt": r"downsample_layers\.0\.0\.weight$",
    "Hugging Face ConvNeXt": r"(model\.)?stages\.0\.downsample_layers\.0\.weight$",  # 5.x and 4.x
    "timm ConvNeXt": r"stages\.0\.blocks\.0\.conv_dw\.weight$",
}
_RULES: dict[str, list[tuple[str, str]]] = {
    "official ConvNeXt": [],
    "Hugging Face ConvNeXt": [
        (r"^(?:model\.)?stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1."),
        (r"^(?:model\.)?stages\.(\d+)\.layers\.", r"stages.\1."),
        (r"\.depthwise_conv\.", ".dwconv."),
        (r"\.pointwise_conv([12])\.", r".pwconv\1."),
        (r"(^|\.)layer_norm\.", r"\1norm."),
    ],
    "timm ConvNeXt": [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
    ],
}


def convnext_layout(tensors: Mapping[str, Tensor]) -> str | None:
    """The layout of a ConvNeXt's tensors; None for anything else."""
    return next((name for name, mark in MARKS.items() if any(re.match(mark, key) for key in tensors)), None)


def read_convnext(
    tensors: Mapping[str, Tensor], layout: str, hub_config: Mapping[str, Any], where: str | PathLike[str] | None
) -> tuple[dict[str, Tensor], ConvNeXtConfig]:
    """The tensors in our names, and the architecture that their shapes say. Errors: WeightsError."""
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in _RULES[layout]:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for kind in ("weight", "bias"):  # the official module tree lists the final norm twice
        again, norm = renamed.get(f"norms.3.{kind}"), renamed.get(f"norm.{kind}")
        if again is not None and norm is not None and torch.equal(again, norm):
            del renamed[f"norms.3.{kind}"]
    depths = [
        1 + max((int(m[1]) for key in renamed if (m := re.match(rf"stages\.{stage}\.(\d+)\.", key))), default=-1)
        for stage in range(4)
    ]
    dims = [_width(renamed, f"downsample_layers.{stage}.{min(stage, 1)}.weight", where) for stage in range(4)]
    if min(depths) < 1:
        fact = f"not a complete ConvNeXt: stage {depths.index(0)} is missing"
        raise WeightsError(fact, where=where, fix="get the whole file again.")
    fields: dict[str, Any] = {"depths": depths, "dims": dims}
    if "layer_norm_eps" in hub_config:
        fields["norm_eps"] = hub_config["layer_norm_eps"]
    return renamed, ConvNeXtConfig.from_json(fields, where=where)


def _width(tensors: Mapping[str, Tensor], key: str, where: str | PathLike[str] | None) -> int:
    tensor = tensors.get(key)
    if tensor is None or tensor.ndim != 4:
        fact = f"{key} is missing" if tensor is None else f"{key} has shape {tuple(tensor.shape)}"
        raise WeightsError(f"not a complete ConvNeXt: {fact}", where=where, fix="get the whole file again.")
    return int(tensor.shape[0])
