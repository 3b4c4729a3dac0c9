"""Input builders: the model's channels and slices, made into the three-channel images a backbone reads.

Each takes normalised crops (B, C, D + 2 k, H, W), k = `context_slices`, and returns one image per slice,
(B * D, 3, H, W), the slices of a case side by side.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError


class InputBuilder(nn.Module, ABC):
    """Interface. `trainable`: it has weights of its own, so that features cannot be computed once and kept."""

    context_slices: ClassVar[int] = 0
    trainable: bool = False

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    @abstractmethod
    def forward(self, image: Float[Tensor, "B C D H W"]) -> Float[Tensor, "S 3 H W"]:
        """One image per slice."""

    def _refuse(self, wanted: str, fix: str) -> ConfigError:
        return ConfigError(
            f"input builder {type(self).__name__.lower()!r} takes {wanted}, the plan has {self.num_channels}", fix=fix
        )


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
