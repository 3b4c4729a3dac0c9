"""What every decoder is: features in, logits out, at any size asked for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.features import Features


class Decoder(nn.Module, ABC):
    """Interface: a decoder computes `hidden` features, `to_logits` makes scores of them on the same grid.

    A constructor takes `embed_dims` (channels of each tap it reads), `num_outputs` (None where a detail stream's
    refinement follows, which reads `hidden` instead) and, by name, those settings of ModelConfig that it reads.
    num_taps:     feature maps it reads (the last ones).
    num_dims:     spatial dimensions it works in; for a decoder of 2 only, the slices of a volume are the batch.
    fuses_detail: it takes a detail stream's coarsest map into its own pyramid; for others it is added to `hidden`.
    reads_image:  it reads the voxels, and takes them as `image` (B, C, D, H, W) in every call, normalised and without
                  context slices.
    hidden_width: channels of `hidden`.
    """

    num_taps: ClassVar[int]
    num_dims: ClassVar[tuple[int, ...]]
    fuses_detail: ClassVar[bool] = False
    reads_image: ClassVar[bool] = False
    hidden_width: int
    to_logits: nn.Module

    @abstractmethod
    def hidden(
        self, features: Features, detail: Float[Tensor, "B C *fine"] | None = None
    ) -> Float[Tensor, "B W *spatial"]:
        """What the scores are made of, on the decoder's own grid, whose outer edges agree with those of the image."""

    def native_logits(self, features: Features) -> Float[Tensor, "B K *spatial"]:
        """Logits on the decoder's own grid."""
        logits: Tensor = self.to_logits(self.hidden(features))
        return logits

    def forward(self, features: Features, size: Sequence[int] | None = None) -> Float[Tensor, "B K *spatial"]:
        """Logits in float32, brought to `size` by one linear interpolation (default: every voxel of the token grid)."""
        if size is None:
            size = [n * p for n, p in zip(features.maps[-1].shape[2:], features.patch_size, strict=True)]
        logits = self.native_logits(features).float()
        if logits.shape[2:] == tuple(size):
            return logits
        return F.interpolate(logits, size=tuple(size), mode="trilinear" if len(size) == 3 else "bilinear")


def classifier(width: int, num_outputs: int | None, *, num_dims: int) -> nn.Module:
    """The 1 x 1 (x 1) convolution to logits; the identity where a refinement follows."""
    if num_outputs is None:
        return nn.Identity()
    return nn.Conv2d(width, num_outputs, 1) if num_dims == 2 else nn.Conv3d(width, num_outputs, 1)
