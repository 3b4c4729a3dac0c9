"""MedDINOv3's decoder: taps concatenated, then four doublings (Primus style; arXiv 2509.02379; dossier 2.1).

Written from the description; agrees with numbers of the authors' code (tests/parity).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.decoders.base import Decoder, classifier
from voxdino.models.features import Features

NUM_DOUBLINGS = 4  # log2 of a patch of 16; on a patch of 14 the decoder's grid is a little finer than the voxels
_NORM_EPS = 1e-6
_SLOPE = 1e-2  # of the He initialisation


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W).

    Where nothing is learned in float32 it is computed term by term, in the order of the authors' code: at pixels whose
    few channels nearly agree, the rounding of a fused LayerNorm alone is 1e-5 off.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if x.requires_grad or x.dtype != torch.float32:
            out: Tensor = super().forward(x.movedim(1, -1))
            return out.movedim(-1, 1)
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + self.eps).sqrt_()
        return x.mul_(self.weight[:, None, None]).add_(self.bias[:, None, None])


class Doubling(nn.Module):
    """Transposed convolution to four children per pixel, channel norm, GELU."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(width, out_width, 2, stride=2)
        self.norm = ChannelNorm(out_width, eps=_NORM_EPS)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C2 H W"]:
        return F.gelu(self.norm(self.conv(x)))


class PrimusDecoder(Decoder):
    """All taps side by side on the token grid, then doublings that halve the channels, down to the voxels; no skips.

    Nothing mixes neighbouring tokens: what a voxel is was decided in the backbone, which is why the authors train it.
    25.1 M weights at ViT-B with 16 classes.

    primus_width: first project the concatenation to so many channels by a 1 x 1 convolution; None: as published. Not in
                  the paper: at ViT-S, 384 instead of 1536 takes a tenth of the arithmetic, which a CPU needs.
    """

    num_taps = 4
    num_dims = (2,)

    def __init__(
        self, *, embed_dims: tuple[int, ...], num_outputs: int | None, primus_width: int | None = None
    ) -> None:
        super().__init__()
        width = primus_width or sum(embed_dims)
        self.project = nn.Identity() if primus_width is None else nn.Conv2d(sum(embed_dims), width, 1)
        widths = [max(1, width >> step) for step in range(NUM_DOUBLINGS + 1)]
        self.doublings = nn.Sequential(*(Doubling(widths[i], widths[i + 1]) for i in range(NUM_DOUBLINGS)))
        self.hidden_width = widths[-1]
        self.to_logits = classifier(self.hidden_width, num_outputs, num_dims=2)
        self.apply(_initialise)

    def hidden(self, features: Features, detail: Tensor | None = None) -> Float[Tensor, "B W H2 W2"]:
        """On a grid 16 times finer than the tokens."""
        out: Tensor = self.doublings(self.project(torch.cat(features.maps[-self.num_taps :], dim=1)))
        return out


class SingleTapPrimusDecoder(PrimusDecoder):
    """The ablation without aggregation: the last tap alone (1.57 M weights at ViT-B)."""

    num_taps = 1


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def from_meddinov3_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names (`up_projection.decode.0.0.weight`, ...) turned into ours; unknown ones are kept."""
    renamed = {}
    for key, value in state.items():
        parts = key.removeprefix("up_projection.").removeprefix("decode.").split(".")
        if parts[0] == str(NUM_DOUBLINGS) and len(parts) == 2:
            parts[0] = "to_logits"
        elif len(parts) == 3 and parts[1] in ("0", "1"):
            parts[:2] = ["doublings", parts[0], ("conv", "norm")[int(parts[1])]]
        renamed[".".join(parts)] = value
    return renamed
