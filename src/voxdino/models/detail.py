"""A small residual network beside the backbone, for the boundaries that patches of 14 or 16 voxels blur.

The detail-recovery stream, the gate and the refinement of DINO-Med3D (arXiv 2606.18886; dossier 1.4), written from the
description; they agree with numbers of the authors' code (tests/parity). All of them keep the number of slices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class DetailMaps:
    """What a detail stream sees in crops of (D, H, W) voxels, fine to coarse; sides are halved in plane, rounded up.

    full: 16 channels at every voxel. half: 32 channels, (D, ⌈H/2⌉, ⌈W/2⌉). quarter: `width` channels, ⌈H/4⌉, ⌈W/4⌉.
    """

    full: Float[Tensor, "B c1 D H W"]
    half: Float[Tensor, "B c2 D H2 W2"]
    quarter: Float[Tensor, "B c3 D H4 W4"]


class DetailStream(nn.Module):
    """Crops to DetailMaps: residual blocks of `base`, 2 `base` and 4 `base` channels, a stride of 2 in plane between.

    width:      channels of the quarter map; those of the decoder it is fused with.
    volumetric: kernels of 3 x 3 x 3; False: 1 x 3 x 3, for pictures and single slices.
    """

    def __init__(self, *, num_channels: int, width: int = 256, base: int = 16, volumetric: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(num_channels, base, volumetric=volumetric), *_norm_relu(base))
        self.at_full = ResidualBlock(base, base, volumetric=volumetric)
        self.at_half = nn.Sequential(
            ResidualBlock(base, 2 * base, stride=2, volumetric=volumetric),
            ResidualBlock(2 * base, 2 * base, volumetric=volumetric),
        )
        self.at_quarter = nn.Sequential(
            ResidualBlock(2 * base, 4 * base, stride=2, volumetric=volumetric),
            ResidualBlock(4 * base, 4 * base, volumetric=volumetric),
        )
        self.widen = nn.Conv3d(4 * base, width, 1)

    def forward(self, image: Float[Tensor, "B C D H W"]) -> DetailMaps:
        full = self.at_full(self.stem(image))
        half = self.at_half(full)
        return DetailMaps(full, half, self.widen(self.at_quarter(half)))


class ResidualBlock(nn.Module):
    """Two convolutions with instance norm and ReLU around a shortcut; `stride` in plane only, sides rounded up."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, volumetric: bool = True) -> None:
        super().__init__()
        self.first = _convolution(in_channels, out_channels, stride=stride, volumetric=volumetric)
        self.second = _convolution(out_channels, out_channels, volumetric=volumetric)
        self.norm = nn.InstanceNorm3d(out_channels)  # has no weights
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            reduce = nn.Conv3d(in_channels, out_channels, 1, stride=(1, stride, stride), bias=False)
            self.shortcut = nn.Sequential(reduce, nn.InstanceNorm3d(out_channels))

    def forward(self, x: Float[Tensor, "B c D H W"]) -> Float[Tensor, "B C D h w"]:
        out = F.relu(self.norm(self.first(x)), inplace=True)
        out = self.norm(self.second(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class GatedFusion(nn.Module):
    """vit + sigmoid(1 x 1 x 1 convolution of both) * cnn: detail comes in where the features ask for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Conv3d(2 * width, width, 1)

    def forward(self, vit: Float[Tensor, "B C D h w"], cnn: Float[Tensor, "B C D h w"]) -> Float[Tensor, "B C D h w"]:
        gate: Tensor = self.gate(torch.cat((vit, cnn), dim=1))
        return vit + gate.sigmoid() * cnn


class Refinement(nn.Module):
    """Hidden features of a decoder to logits at every voxel, through the half and the full map of the detail stream.

    widths: channels after each of the two steps; a step enlarges linearly, joins, and convolves twice.
    """

    def __init__(
        self,
        *,
        hidden_width: int,
        num_outputs: int,
        base: int = 16,
        widths: tuple[int, int] = (64, 32),
        volumetric: bool = True,
    ) -> None:
        super().__init__()
        self.to_half = _two_convolutions(hidden_width + 2 * base, widths[0], volumetric=volumetric)
        self.to_full = _two_convolutions(widths[0] + base, widths[1], volumetric=volumetric)
        self.to_logits = nn.Conv3d(widths[1], num_outputs, 1)

    def forward(self, hidden: Float[Tensor, "B C d h w"], detail: DetailMaps) -> Float[Tensor, "B K D H W"]:
        x = self.to_half(torch.cat((resize(hidden, detail.half), detail.half), dim=1))
        x = self.to_full(torch.cat((resize(x, detail.full), detail.full), dim=1))
        logits: Tensor = self.to_logits(x)
        return logits


def resize(x: Float[Tensor, "B C d h w"], like: Float[Tensor, "B c D H W"]) -> Float[Tensor, "B C D H W"]:
    """`x` on the grid of `like`, linearly, outer edges agreeing."""
    if x.shape[2:] == like.shape[2:]:
        return x
    if x.device.type == "cpu":  # trilinear is four times as fast there, the copy included
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.interpolate(x, size=like.shape[2:], mode="trilinear")


def _convolution(in_channels: int, out_channels: int, *, stride: int = 1, volumetric: bool) -> nn.Conv3d:
    depth = 3 if volumetric else 1
    return nn.Conv3d(
        in_channels, out_channels, (depth, 3, 3), (1, stride, stride), padding=(depth // 2, 1, 1), bias=False
    )


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm3d(channels), nn.ReLU(inplace=True)


def _two_convolutions(in_channels: int, out_channels: int, *, volumetric: bool) -> nn.Sequential:
    return nn.Sequential(
        _convolution(in_channels, out_channels, volumetric=volumetric),
        *_norm_relu(out_channels),
        _convolution(out_channels, out_channels, volumetric=volumetric),
        *_norm_relu(out_channels),
    )
