"""What every backbone is: images in, feature maps of chosen parts out, all on one grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError
from voxdino.core.records import Record
from voxdino.models.features import Features

Ability = Literal["lora", "depth_adapter", "drop_path", "rope_rescale", "gradient_checkpointing"]


class Backbone(nn.Module, ABC):
    """Interface: images (B, P, H, W), sides a multiple of `patch_size`, to `Features` of some of its `depth` parts.

    config:     rebuilds it without weights (see `build_backbone`).
    depth:      parts whose output can be tapped: blocks of a transformer, stages of a convolutional network.
    patch_size: pixels per token of the grid that all taps are brought to.
    abilities:  what can be asked of it besides training all, the last or none of its parts.
    Training options, off until set, only for those who have the ability: `gradient_checkpointing` (recompute blocks in
    the backward pass), `drop_path` (share of images that skip a branch), `rope_rescale` (see ViT).
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset()
    config: Record
    depth: int
    patch_size: int
    gradient_checkpointing: bool = False
    drop_path: float = 0.0
    rope_rescale: float | None = None

    @abstractmethod
    def default_taps(self) -> tuple[int, ...]:
        """The parts (0-based) that decoders read unless told otherwise, shallow to deep."""

    @abstractmethod
    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        """Channels of the maps of these parts."""

    @abstractmethod
    def forward(
        self,
        images: Float[Tensor, "B P H W"],
        *,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        """Features of the parts in `taps` (default: `default_taps`), shallow to deep.

        tap_norm:       apply the final norm to every tap that it fits, or leave them raw.
        num_slices:     so many images in a row are the slices of one volume; read by depth adapters only.
        images_at_once: bounds the memory; the result is the same.
        Errors: ConfigError for taps it does not have, sides that are no multiple of the patch.
        """

    @abstractmethod
    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        """The last `num_parts` parts and the final norm: what trains when only the end of a backbone does."""

    @abstractmethod
    def level(self, name: str) -> int:
        """The part that the parameter `name` belongs to: -1 before the first, depth - 1 for the final norm too."""

    def idle_parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that `forward` never reads (of self-supervised training): kept with the weights, never trained."""
        return ()

    def _chosen(self, taps: Sequence[int] | None) -> tuple[int, ...]:
        """The taps asked for, checked."""
        chosen = self.default_taps() if taps is None else tuple(taps)
        if not chosen or not all(0 <= tap < self.depth for tap in chosen):
            raise ConfigError(
                f"taps {chosen} do not fit a backbone of {self.depth} blocks",
                fix=f"choose from 0 to {self.depth - 1}, e.g. {self.default_taps()}.",
            )
        return chosen

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ConfigError(
                f"images of {height} x {width} pixels are no multiple of the backbone's patch of {self.patch_size}",
                fix=f"resize or pad them to a multiple of {self.patch_size}.",
            )
        return height // self.patch_size, width // self.patch_size


def pad_to_multiple(images: Float[Tensor, "B P H W"], multiple: int) -> Float[Tensor, "B P H2 W2"]:
    """Repeat the last row and column until both sides are a multiple: no stride then cuts a remainder off."""
    rows, columns = (-side % multiple for side in images.shape[2:])
    return F.pad(images, (0, columns, 0, rows), mode="replicate") if rows or columns else images


def in_portions(run: Callable[[Tensor], Sequence[Tensor]], images: Tensor, at_once: int | None) -> list[Tensor]:
    """What `run` gives for all images, computed for so many at a time."""
    parts = [run(part) for part in torch.split(images, at_once or max(len(images), 1))]
    return list(parts[0]) if len(parts) == 1 else [torch.cat(same) for same in zip(*parts, strict=True)]


def on_grid(
    stage_map: Float[Tensor, "B E h w"], grid: tuple[int, int], *, stride: int, patch_size: int
) -> Float[Tensor, "B E h2 w2"]:
    """A map of one stride, brought to the token grid: finer ones averaged, coarser ones resized bilinearly.

    Outer edges agree; what padding added is cut off.
    """
    if stride < patch_size:
        stage_map = F.avg_pool2d(stage_map, patch_size // stride)
    elif stride > patch_size:
        stage_map = F.interpolate(stage_map, scale_factor=stride // patch_size, mode="bilinear")
    return stage_map[:, :, : grid[0], : grid[1]]
