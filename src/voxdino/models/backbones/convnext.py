"""DINOv3's convolutional family: ConvNeXt, four stages with strides 4, 8, 16 and 32, behind the seam of the ViTs.

Written from the description in the dossier (section 5.1) and checked against numbers of the authors' code
(tests/parity). Parameter names are those of the official files, less `norms.3`, which repeats `norm`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxdino.core.records import Record
from voxdino.models.backbones.base import Ability, Backbone, in_portions, on_grid, pad_to_multiple
from voxdino.models.backbones.blocks import add_rows, kept_rows, take_rows
from voxdino.models.features import Features

STRIDES = (4, 8, 16, 32)
PATCH_SIZE = 16
Four = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class ConvNeXtConfig(Record):
    """The architecture of a ConvNeXt: blocks (`depths`) and channels (`dims`) of its stages."""

    family: Literal["dinov3_convnext"] = "dinov3_convnext"
    depths: Four
    dims: Four
    norm_eps: PositiveFloat = 1e-6
    layer_scale_init: float = 1e-6

    @property
    def num_blocks(self) -> int:
        return sum(self.depths)

    def summary(self) -> str:
        """One line for tables and messages."""
        depths, dims = ("-".join(map(str, four)) for four in (self.depths, self.dims))
        return f"{self.family} of {depths} blocks and {dims} channels, patch {PATCH_SIZE}"


class ConvBlock(nn.Module):
    """7 x 7 depth-wise convolution, LayerNorm, feed-forward of four times the width, scaled, added to its input."""

    def __init__(self, dim: int, *, norm_eps: float, layer_scale_init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "B E h w"], drop_path: float = 0.0) -> Float[Tensor, "B E h w"]:
        """drop_path: the share of images that skip the branch (used while training only)."""
        rows = kept_rows(x, drop_path if self.training else 0.0)
        y = self.norm(self.dwconv(take_rows(x, rows)).permute(0, 2, 3, 1))  # (B, h, w, E)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return add_rows(x, y.permute(0, 3, 1, 2), rows)


class ConvNeXt(Backbone):
    """Images (B, 3, H, W), sides a multiple of 16, to features of chosen stages, all on the 1/16 grid.

    Finer stages are averaged, the last one is resized bilinearly. Sides that are no multiple of 32 are extended by
    their last row and column, so that no stage cuts a remainder off. The class token is the average of the last stage
    through the final norm. `tap_norm` is the final norm on the last stage; no other stage has one (dossier 5.1).
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(("drop_path", "gradient_checkpointing"))
    config: ConvNeXtConfig
    depth = len(STRIDES)
    patch_size = PATCH_SIZE

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        eps, dims = config.norm_eps, config.dims
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), _MapNorm(dims[0], eps=eps))])
        for before, after in pairwise(dims):
            self.downsample_layers.append(nn.Sequential(_MapNorm(before, eps=eps), nn.Conv2d(before, after, 2, 2)))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(dim, norm_eps=eps, layer_scale_init=config.layer_scale_init) for _ in range(num_blocks)
            )
            for dim, num_blocks in zip(dims, config.depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=eps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        chosen, grid = self._chosen(taps), self._grid(images)
        padded = pad_to_multiple(images, STRIDES[-1])
        stages = in_portions(self.stage_maps, padded, images_at_once)
        cls_token = self.norm(stages[-1].mean(dim=(2, 3)))  # (B, E)
        if tap_norm:
            stages[-1] = _over_channels(self.norm, stages[-1])
        maps = tuple(on_grid(stages[tap], grid, stride=STRIDES[tap], patch_size=PATCH_SIZE) for tap in chosen)
        return Features(maps, cls_token, (PATCH_SIZE, PATCH_SIZE))

    def stage_maps(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """The four stages as they leave the network, (B, E_i, H / stride, W / stride) each, without any norm."""
        maps, x = [], images
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = self._run(block, x, self.drop_path)
            maps.append(x)
        return tuple(maps)

    def default_taps(self) -> tuple[int, ...]:
        return tuple(range(self.depth))

    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.config.dims[tap] for tap in taps)

    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        first = self.depth - num_parts
        return (*self.downsample_layers[first:], *self.stages[first:], self.norm) if num_parts else ()

    def level(self, name: str) -> int:
        """The stem belongs to the first stage."""
        first, _, rest = name.partition(".")
        return self.depth - 1 if first == "norm" else int(rest.partition(".")[0])

    def _run(self, layer: Callable[..., Tensor], x: Tensor, *settings: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(layer, x, *settings, use_reentrant=False)
            return recomputed
        return layer(x, *settings)


class _MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return _over_channels(super().forward, x)


def _over_channels(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
