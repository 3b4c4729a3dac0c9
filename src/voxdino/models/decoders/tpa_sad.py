"""SegDINO v2: token pyramid adaptation and scale-aware decoding (arXiv 2606.17972; dossier 3.1).

Written from the description; agrees with numbers of the authors' code (tests/parity).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError
from voxdino.models.decoders.base import Decoder, classifier
from voxdino.models.features import Features

Pyramid = Literal["x8_x4_x2_x1", "first_release"]
PUBLISHED_SCALES = (8, 4, 2, 1)
WORTHWHILE_SHARE = 0.4  # of the work of a convolution: small products reach less of a CPU's speed


class GatedBlock(nn.Module):
    """x + gate * GELU(norm(point-wise(depth-wise(x)))); the gate starts at 0, so the block as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(32, width), width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        cleaned = F.gelu(self.norm(self.pointwise(self.depthwise(x))))
        return x + self.gate.to(cleaned.dtype) * cleaned  # a CPU: float32 would double what moves


class EnlargeAndConvolve(nn.Module):
    """Bilinear enlargement, then a 3 x 3 convolution.

    Both are linear; one mixes places, the other channels. On a CPU, where it is less work, they change places: each of
    the nine taps is applied to the small map, and what becomes of its rows and columns, enlarged and shifted, is a
    small matrix. The same numbers, up to 11 times as fast (docs/results/decoder.md).
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        if x.device.type == "cpu" and _share_of_work(x.shape[1:], self.scale) < WORTHWHILE_SHARE:
            return self._taps_first(x)
        if self.scale > 1:
            x = F.interpolate(x, size=(x.shape[2] * self.scale, x.shape[3] * self.scale), mode="bilinear")
        out: Tensor = self.conv(x)
        return out

    def _taps_first(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        images, channels, height, width = x.shape
        taps = self.conv.weight.permute(2, 3, 0, 1).reshape(-1, channels)  # (3 * 3 * C, C)
        tapped = F.linear(x.permute(0, 2, 3, 1), taps).unflatten(-1, (3, 3, -1))  # (B, h, w, 3, 3, C)
        parts = tapped.permute(0, 3, 1, 4, 2, 5).reshape(images, 3 * height, 3 * width, channels)
        parts = _enlarged_taps(width, self.scale, parts) @ parts  # (B, 3 * h, W, C)
        out: Tensor = _enlarged_taps(height, self.scale, parts) @ parts.flatten(2)  # (B, H, W * C)
        out = out.unflatten(-1, (width * self.scale, channels)).permute(0, 3, 1, 2)  # channels last in memory
        return out


def _share_of_work(shape: Sequence[int], scale: int) -> float:
    """Products of taps and matrices for a map (C, h, w), of those of a convolution of the enlarged one."""
    channels, height, width = shape
    return 1 / scale**2 + (width / scale + height / 3) / channels


def _enlarged_taps(length: int, scale: int, like: Tensor) -> Float[Tensor, "L l3"]:
    """Of a line of `length` values, enlarged: what each of three taps sees at every place, 0 beyond the ends."""
    unit = torch.eye(length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    lines = F.interpolate(unit[None], size=length * scale, mode="linear")[0].T  # (L, l)
    ends = F.pad(lines, (0, 0, 1, 1))
    return torch.cat([ends[:-2], lines, ends[2:]], dim=1).to(like.dtype)


class TpaSadDecoder(Decoder):
    """Four maps become a pyramid, shallow fine to deep coarse; gated blocks clean each level and merge them upwards.

    width:          channels of all levels (the authors: 256; 128 is their constructor's default, 512 for hard sets).
    pyramid:        how the levels are made: the present form (enlarge by `pyramid_scales`, convolve), or the authors'
                    first release (transposed convolutions x4 and x2, identity, stride 2), there with width = embed_dim.
    pyramid_scales: enlargement of the token grid per level; published: 8, 4, 2, 1. Others are ours: where the input is
                    magnified four times, (4, 4, 2, 1) still ends finer than a voxel and takes a quarter of the time.
    """

    num_taps = 4
    num_dims = (2,)

    def __init__(
        self,
        *,
        embed_dims: tuple[int, ...],
        num_outputs: int | None,
        decoder_width: int = 128,
        pyramid: Pyramid = "x8_x4_x2_x1",
        pyramid_scales: tuple[int, ...] = PUBLISHED_SCALES,
    ) -> None:
        super().__init__()
        _check_scales(pyramid, pyramid_scales)
        width = decoder_width
        self.hidden_width = width
        self.project = nn.ModuleList(nn.Conv2d(embed_dim, width, 1, bias=False) for embed_dim in embed_dims)
        self.levels = nn.ModuleList(
            [
                nn.ConvTranspose2d(width, width, 4, stride=4),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
            ]
            if pyramid == "first_release"
            else [EnlargeAndConvolve(width, scale) for scale in pyramid_scales]
        )
        self.intra = nn.ModuleList(GatedBlock(width) for _ in range(self.num_taps))
        self.inter = nn.ModuleList(GatedBlock(width) for _ in range(self.num_taps))
        self.to_logits = classifier(width, num_outputs, num_dims=2)

    def hidden(self, features: Features, detail: Tensor | None = None) -> Float[Tensor, "B C H W"]:
        """The finest level: H / 2 of the magnified image for patch 16 and scale 8."""
        maps = features.maps[-self.num_taps :]
        parts = zip(maps, self.project, self.levels, self.intra, strict=True)
        pyramid = [intra(level(project(tokens))) for tokens, project, level, intra in parts]  # fine to coarse
        x: Tensor = self.inter[-1](pyramid[-1])
        for level, inter in zip(pyramid[-2::-1], list(self.inter)[-2::-1], strict=True):
            if x.shape[2:] != level.shape[2:]:
                x = F.interpolate(x, size=level.shape[2:], mode="bilinear")
            x = inter(x + level)
        return x


def _check_scales(pyramid: str, scales: tuple[int, ...]) -> None:
    falling = all(a >= b for a, b in pairwise(scales))
    if len(scales) != TpaSadDecoder.num_taps or min(scales) < 1 or not falling:
        fix = "give one whole number per tap, never rising, e.g. [8, 4, 2, 1] or [4, 4, 2, 1]."
        raise ConfigError(f"pyramid_scales {scales} are no four falling enlargements", fix=fix)
    if pyramid == "first_release" and scales != PUBLISHED_SCALES:
        fix = "leave pyramid_scales at [8, 4, 2, 1], or use pyramid x8_x4_x2_x1."
        raise ConfigError("the first release's pyramid has scales of its own", fix=fix)


def from_segdino_v2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names (`decoder.token_projections.0.weight`, ...) turned into ours; unknown ones are kept."""
    renamed = {}
    for key, value in state.items():
        parts = key.removeprefix("decoder.").split(".")
        stem, _, number = parts[0].rpartition("_")
        if parts[0] == "token_projections":
            parts[0] = "project"
        elif parts[0] == "out_conv":
            parts[0] = "to_logits"
        elif stem in ("tpa_branch", "sad_intra", "sad_inter"):
            ours = {"tpa_branch": "levels", "sad_intra": "intra", "sad_inter": "inter"}[stem]
            parts[:1] = [ours, str(int(number) - 1)]
            if parts[-1] == "gamma":
                parts[-1] = "gate"
        renamed[".".join(parts)] = value
    return renamed
