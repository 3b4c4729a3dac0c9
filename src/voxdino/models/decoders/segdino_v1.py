"""SegDINO v1: project, convolve, concatenate (arXiv 2509.00833; dossier 3.2).

Written from the description; agrees with numbers of the authors' code (tests/parity).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.decoders.base import Decoder, classifier
from voxdino.models.features import Features

HeadForm = Literal["paper", "release"]
PROJECTIONS = (96, 192, 384, 768)
ENLARGEMENT = 4  # of the first tap in the release


class SegdinoV1Decoder(Decoder):
    """Every tap is projected, shallow thin to deep wide, convolved to one width and concatenated; then one 1 x 1 layer.

    decoder_width: channels of each tap after its 3 x 3 convolution (published: 128).
    projections:   channels of the four 1 x 1 projections.
    head_form:     "paper": all on the token grid; 2,213,793 weights at ViT-S, as printed. "release": the authors' later
                   correction enlarges the first tap four times by a transposed convolution and brings the others to
                   it; resizing there, also the last one to voxels, lets the corner pixels' centres agree
                   (align_corners), which moves the outermost logits by up to two voxels; kept for their weights.
    """

    num_taps = 4
    num_dims = (2,)

    def __init__(
        self,
        *,
        embed_dims: tuple[int, ...],
        num_outputs: int | None,
        decoder_width: int = 128,
        projections: tuple[int, ...] = PROJECTIONS,
        head_form: HeadForm = "paper",
    ) -> None:
        super().__init__()
        self.hidden_width = self.num_taps * decoder_width
        self.project = nn.ModuleList(nn.Conv2d(e, width, 1) for e, width in zip(embed_dims, projections, strict=True))
        self.convolve = nn.ModuleList(
            nn.Conv2d(width, decoder_width, 3, padding=1, bias=False) for width in projections
        )
        self.enlarge: nn.Module | None = None
        if head_form == "release":
            self.enlarge = nn.ConvTranspose2d(decoder_width, decoder_width, ENLARGEMENT, ENLARGEMENT, bias=False)
        self.to_logits = classifier(self.hidden_width, num_outputs, num_dims=2)

    def hidden(self, features: Features, detail: Tensor | None = None) -> Float[Tensor, "B W H2 W2"]:
        """The concatenated maps: on the token grid (paper), or four times finer (release)."""
        parts = zip(features.maps[-self.num_taps :], self.project, self.convolve, strict=True)
        levels: list[Tensor] = [convolve(project(tokens)) for tokens, project, convolve in parts]
        if self.enlarge is not None:
            levels[0] = self.enlarge(levels[0])
            levels[1:] = [_with_corners(level, levels[0].shape[2:]) for level in levels[1:]]
        return torch.cat(levels, dim=1)

    def forward(self, features: Features, size: Sequence[int] | None = None) -> Float[Tensor, "B K H W"]:
        if self.enlarge is None:
            return super().forward(features, size)
        if size is None:
            size = [n * p for n, p in zip(features.maps[-1].shape[2:], features.patch_size, strict=True)]
        return _with_corners(self.native_logits(features).float(), size)


def _with_corners(x: Float[Tensor, "B C h w"], size: Sequence[int]) -> Float[Tensor, "B C H W"]:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def from_segdino_v1(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names (`head.projects.0.weight`, ...) turned into ours; unknown ones are kept."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("head.").removeprefix("scratch.")
        first, _, rest = name.partition(".")
        if first == "projects":
            name = f"project.{rest}"
        elif first.startswith("layer") and first.endswith("_rn"):
            name = f"convolve.{int(first[5:-3]) - 1}.{rest}"
        elif first in ("output_conv", "proj"):
            name = f"{'to_logits' if first == 'output_conv' else 'enlarge'}.{rest}"
        renamed[name] = value
    return renamed
