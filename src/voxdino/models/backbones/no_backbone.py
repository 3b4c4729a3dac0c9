"""The backbone of models that read the image themselves: none."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.records import Record
from voxdino.models.backbones.base import Backbone
from voxdino.models.features import Features

_PATCH_SIZE = 16  # crops are planned as for the others


class NoBackboneConfig(Record):
    """Nothing to configure."""

    family: Literal["none"] = "none"

    @property
    def num_blocks(self) -> int:
        return 0

    def summary(self) -> str:
        """One line for tables."""
        return "none: for decoders that read the image"


class NoBackbone(Backbone):
    """No weights, nothing to tap: features without maps, for decoders that read the image (`reads_image`)."""

    depth = 0
    patch_size = _PATCH_SIZE

    def __init__(self, config: NoBackboneConfig) -> None:
        super().__init__()
        self.config: NoBackboneConfig = config

    def forward(
        self,
        images: Float[Tensor, "B P H W"],
        *,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        return Features((), images.new_empty(len(images), 0), (_PATCH_SIZE, _PATCH_SIZE))

    def default_taps(self) -> tuple[int, ...]:
        return ()

    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        assert not taps
        return ()

    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        return ()

    def level(self, name: str) -> int:
        return -1
