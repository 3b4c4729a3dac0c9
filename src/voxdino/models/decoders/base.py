"""What every decoder is: features in, logits out, at any size asked for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.features import Features


class Decoder(nn.Module, ABC):
    """Interface: a decoder computes `native_logits`; bringing them to a size is the same for all.

    A constructor takes `embed_dim`, `num_outputs` and, by name, those settings of ModelConfig that it reads.
    num_taps: feature maps it reads (the last ones).
    num_dims: spatial dimensions it works in; for a decoder of 2 only, the slices of a volume are the batch.
    """

    num_taps: ClassVar[int]
    num_dims: ClassVar[tuple[int, ...]]

    @abstractmethod
    def native_logits(self, features: Features) -> Float[Tensor, "B K *spatial"]:
        """Logits on the decoder's own grid, whose outer edges agree with those of the image."""

    def forward(self, features: Features, size: Sequence[int] | None = None) -> Float[Tensor, "B K *spatial"]:
        """Logits in float32, brought to `size` by one linear interpolation (default: every voxel of the token grid)."""
        if size is None:
            size = [n * p for n, p in zip(features.maps[-1].shape[2:], features.patch_size, strict=True)]
        logits = self.native_logits(features).float()
        if logits.shape[2:] == tuple(size):
            return logits
        return F.interpolate(logits, size=tuple(size), mode="trilinear" if len(size) == 3 else "bilinear")
