"""The benchmark's volumetric probe: slices stacked to a feature volume, a light 3-D decoder with skips.

"Does DINOv3 set a new medical vision standard?" (arXiv 2509.06467; dossier 4.1) says no more than that of its decoder;
widths and blocks are ours.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError
from voxdino.models.decoders.base import Decoder, classifier
from voxdino.models.features import Features


class Conv3dDecoder(Decoder):
    """From deep to shallow: add the projected tap, a residual 3 x 3 x 3 block, enlarge in plane; depth stays.

    The two deepest taps are joined on the token grid, the next on one twice as fine, the shallowest on the finest.
    0.81 M weights at ViT-S and width 64; a step on 16 slices of 13 x 9 tokens takes 0.2 s of one CPU core in bfloat16.
    (Whole 3 x 3 x 3 kernels: there a pair of 1 x 3 x 3 and 3 x 1 x 1 takes half the time, a depth-wise one more.)

    decoder_width: channels of all levels but the finest, which has half.
    finest_scale:  enlargement of the finest level in plane: 4, or 2 or 1 where magnified input makes tokens small.
    """

    num_taps = 4
    num_dims = (3,)

    def __init__(
        self, *, embed_dims: tuple[int, ...], num_outputs: int | None, decoder_width: int = 64, finest_scale: int = 4
    ) -> None:
        super().__init__()
        if finest_scale not in (1, 2, 4):
            raise ConfigError(f"finest_scale {finest_scale} cannot be built", fix="choose 4, 2 or 1.")
        if decoder_width < 4 or decoder_width % 2:
            raise ConfigError(f"decoder_width {decoder_width} cannot be halved", fix="give an even number, e.g. 64.")
        self.hidden_width = decoder_width // 2
        widths = (decoder_width, decoder_width, decoder_width, self.hidden_width)
        self.scales = (1, 1, min(2, finest_scale), finest_scale)  # both deep to shallow
        self.project = nn.ModuleList(
            nn.Conv3d(dim, width, 1) for dim, width in zip(embed_dims[::-1], widths, strict=True)
        )
        self.blocks = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.narrow = nn.Conv3d(decoder_width, self.hidden_width, 1, bias=False)
        self.to_logits = classifier(self.hidden_width, num_outputs, num_dims=3)

    def hidden(self, features: Features, detail: Tensor | None = None) -> Float[Tensor, "B W D H2 W2"]:
        """On a grid `finest_scale` times finer than the tokens in plane."""
        maps = features.maps[-self.num_taps :][::-1]
        depth, rows, columns = maps[0].shape[2:]
        x: Tensor | None = None
        for tokens, project, block, scale in zip(maps, self.project, self.blocks, self.scales, strict=True):
            size = (depth, rows * scale, columns * scale)
            level = _enlarge(project(tokens), size)
            if x is not None:
                x = x if x.shape[1] == level.shape[1] else self.narrow(x)
                level = level + _enlarge(x, size)
            x = block(level)
        assert x is not None
        return x


class ResidualBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions with group norm and GELU around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv3d(width, width, 3, padding=1, bias=False)
        groups = math.gcd(8, width // 2)  # of two channels at least: a single token has nothing else to norm over
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(2))

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        out = F.gelu(self.norms[0](self.first(x)))
        return F.gelu(x + self.norms[1](self.second(out)))


def _enlarge(x: Float[Tensor, "B C D h w"], size: tuple[int, int, int]) -> Float[Tensor, "B C D H W"]:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="trilinear")
