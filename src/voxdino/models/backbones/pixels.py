"""The floor of every comparison: no network, the pixels themselves behind the seam of the backbones."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from voxdino.core.records import Record
from voxdino.models.backbones.base import Backbone
from voxdino.models.features import Features

CLASS_SIDE = 28  # pixels per side of what stands for the class token


class PixelConfig(Record):
    """patch_size: pixels per token and axis; take that of the backbones it is compared with."""

    family: Literal["pixels"] = "pixels"
    patch_size: int = Field(default=16, ge=1, le=64)

    @property
    def num_blocks(self) -> int:
        return 0

    def summary(self) -> str:
        """One line for tables."""
        return f"the raw pixels of patches of {self.patch_size}"


class Pixels(Backbone):
    """Images (B, 3, H, W) to tokens that hold the pixels of their patch; the class token is the image at 28 x 28.

    What a probe reads from them it reads without any backbone. All taps are the same.
    """

    depth = 1

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        self.config: PixelConfig = config
        self.patch_size = config.patch_size

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        chosen = self._chosen(taps)
        self._grid(images)
        tokens = F.pixel_unshuffle(images, self.patch_size)  # (B, 3 p p, h, w)
        class_token = F.adaptive_avg_pool2d(images, CLASS_SIDE).flatten(1)  # (B, 3 * 28 * 28)
        return Features((tokens,) * len(chosen), class_token, (self.patch_size, self.patch_size))

    def default_taps(self) -> tuple[int, ...]:
        """One tap, as often as decoders read at most."""
        return (0, 0, 0, 0)

    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        return (3 * self.patch_size**2,) * len(taps)

    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        return ()

    def level(self, name: str) -> int:
        return -1
