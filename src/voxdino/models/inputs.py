"""Input builders: the model's channels and slices, made into the images of three planes or more that a backbone reads.

Each takes normalised crops (B, C, D + 2 k, H, W), k = `context_slices`, and returns one image per slice,
(B * D, P, H, W), the slices of a case side by side; P = `num_planes`.
"""

import re
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError


class InputBuilder(nn.Module, ABC):
    """Interface.

    context_slices:   slices it reads before and after each.
    num_planes:       planes of the images it makes.
    learns_embedding: it needs a patch embedding of its own, which trains (`ViT.widen_input`).
    trainable:        that, or it has weights itself: features cannot be computed once and kept.
    """

    context_slices: ClassVar[int] = 0
    num_planes: ClassVar[int] = 3
    learns_embedding: ClassVar[bool] = False
    trainable: bool = False

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    @abstractmethod
    def forward(self, image: Float[Tensor, "B C D H W"]) -> Float[Tensor, "S P H W"]:
        """One image per slice."""

    def _refuse(self, wanted: str, fix: str) -> ConfigError:
        name = re.sub(r"(\d)", r"_\1", type(self).__name__.lower())  # as in the registry
        return ConfigError(f"input builder {name!r} takes {wanted}, the plan has {self.num_channels}", fix=fix)


class Repeat(InputBuilder):
    """One channel, three times: grey images and single CT windows."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        if num_channels != 1:
            raise self._refuse("1 channel", "use 'rgb' for colours, 'windows' for CT windows, 'channels' for MR.")

    def forward(self, image: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "S 3 H W"]:
        return _slices(image).expand(-1, 3, -1, -1)


class Rgb(InputBuilder):
    """Three colours as they are."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        if num_channels != 3:
            raise self._refuse("3 channels", "use 'repeat' for one channel, 'channels' for others.")

    def forward(self, image: Float[Tensor, "B 3 D H W"]) -> Float[Tensor, "S 3 H W"]:
        return _slices(image)


class Neighbours(InputBuilder):
    """One channel; the previous, the current and the next slice as the three colours (2.5-D).

    As in DINO-Med3D's first stage (dossier 1.3), but the ends of a crop have their real neighbours (1.6).
    """

    context_slices = 1

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        if num_channels != 1:
            raise self._refuse("1 channel", "use 'channels' or 'windows', which read single slices.")

    def forward(self, image: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "S 3 H W"]:
        return _slices(torch.cat((image[:, :, :-2], image[:, :, 1:-1], image[:, :, 2:]), dim=1))


class Slices3(InputBuilder):
    """One channel; three slices as three planes of a patch embedding that is trained with the model.

    The multi-slice embedding of DINO-Med3D's first stage as its paper claims it (arXiv 2606.18886). Its release has
    none: there the fixed, pretrained embedding sees the neighbours as colours, which is the builder "neighbours", and
    where this one starts.
    """

    context_slices = 1
    num_planes = 3
    learns_embedding = True
    trainable = True

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        if num_channels != 1:
            raise self._refuse("1 channel", "use 'channels' or 'windows', which read single slices.")

    def forward(self, image: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "S P H W"]:
        return image[:, 0].unfold(1, self.num_planes, 1).movedim(-1, 2).flatten(0, 1)


class Slices5(Slices3):
    """One channel; five slices as five planes of a patch embedding that is trained with the model.

    The outer two start without effect; see "slices_3".
    """

    context_slices = 2
    num_planes = 5


class Channels(InputBuilder):
    """Any number of channels: 1 repeated; 2 as (a, b, their mean); 3 as they are; more through a learned projection.

    The projection (1 x 1) starts as the averages of three groups of channels and is trained with the model.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        if num_channels < 1:
            raise self._refuse("at least 1 channel", "name the channels in the plan.")
        mixing = torch.zeros(3, num_channels)
        for row, group in enumerate(np.array_split(np.arange(num_channels), 3)):
            mixing[row, torch.from_numpy(group)] = 1 / max(len(group), 1)
        if num_channels == 1:
            mixing = torch.ones(3, 1)
        elif num_channels == 2:
            mixing = torch.tensor([[1, 0], [0, 1], [0.5, 0.5]])
        self.trainable = num_channels > 3
        self.mixing = nn.Parameter(mixing, requires_grad=self.trainable)

    def forward(self, image: Float[Tensor, "B C D H W"]) -> Float[Tensor, "S 3 H W"]:
        return torch.einsum("rc,schw->srhw", self.mixing, _slices(image))


class Windows(Channels):
    """One to three intensity windows of one CT, as channels; never trained."""

    def __init__(self, num_channels: int) -> None:
        if num_channels > 3:
            self.num_channels = num_channels
            raise self._refuse(
                "at most 3 windows", "choose three windows, or use 'channels', which learns a projection."
            )
        super().__init__(num_channels)


def _slices(image: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B * D, C, H, W)."""
    return image.transpose(1, 2).flatten(0, 1)
