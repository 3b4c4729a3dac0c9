"""Our vision transformer: DINOv3 (rotary positions) and DINOv2 (learned positions), one class.

Written from the description in the dossier (sections 2.8 and 5.1 to 5.6) and checked against numbers of the authors'
code (tests/parity). Parameter names are those of the official files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxdino.core.errors import ConfigError
from voxdino.core.records import Record
from voxdino.models.backbones.base import Ability, Backbone
from voxdino.models.backbones.blocks import Block, FfnKind
from voxdino.models.backbones.rope import RopeDtype, RotaryPositions, Rotation
from voxdino.models.features import Features


class ViTConfig(Record):
    """The architecture of a backbone: all that its weights do not say themselves, and what they do.

    family:           dinov3 has rotary positions, dinov2 learned ones on `position_grid` (rows, columns).
    ffn_hidden:       width of the feed-forward layer (of each half, for swiglu).
    mask_k_bias:      the bias of the keys is switched off (DINOv3 with qkv_bias).
    local_cls_norm:   the file holds a norm used only in self-supervised training; kept, never used in forward.
    norm_eps:         1e-5 in DINOv3 releases, 1e-6 in MedDINOv3 and DINOv2.
    layer_scale_init: where LayerScale starts when weights are random.
    in_planes:        channels of an image; 3 in all published weights, others by `ViT.widen_input`.
    """

    family: Literal["dinov3", "dinov2"] = "dinov3"
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt
    ffn: FfnKind = "mlp"
    ffn_hidden: PositiveInt
    qkv_bias: bool = True
    mask_k_bias: bool = True
    num_registers: NonNegativeInt = 4
    local_cls_norm: bool = False
    norm_eps: PositiveFloat = 1e-5
    layer_scale_init: float = 1e-5
    rope_base: PositiveFloat = 100.0
    rope_dtype: RopeDtype = "float32"
    position_grid: tuple[PositiveInt, PositiveInt] | None = None
    in_planes: PositiveInt = 3

    @property
    def num_blocks(self) -> int:
        return self.depth

    def summary(self) -> str:
        """One line for tables and messages."""
        size = f"{self.embed_dim} channels and {self.depth} blocks, {self.num_heads} heads"
        return f"{self.family} ViT of {size}, patch {self.patch_size}"

    @model_validator(mode="after")
    def _fits(self) -> "ViTConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.family == "dinov3" and (self.embed_dim // self.num_heads) % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4, not {self.embed_dim // self.num_heads}")
        if (self.family == "dinov2") != (self.position_grid is not None):
            raise ValueError("position_grid belongs to dinov2, and to it only")
        return self


@dataclass(frozen=True)
class Tokens:
    """What leaves the last block, after the final norm."""

    cls: Float[Tensor, "B E"]
    registers: Float[Tensor, "B R E"]
    patches: Float[Tensor, "B N E"]


def default_taps(depth: int) -> tuple[int, ...]:
    """The four blocks (0-based) whose features decoders read: the last block of each quarter.

    (2, 5, 8, 11) for 12 blocks, (5, 11, 17, 23) for 24. SegDINO's code uses 4 instead of 5 there (dossier 7.2).
    """
    return tuple(math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4))


class ViT(Backbone):
    """Images (B, in_planes, H, W), sides a multiple of the patch, to features of chosen blocks.

    Three training options, off until set: `gradient_checkpointing` (recompute blocks in the backward pass),
    `drop_path` (share of images that skip a branch) and `rope_rescale` (DINOv3's position augmentation: coordinates
    times one log-uniform factor in [1/r, r] per forward pass; the authors' code does this in every training-mode pass,
    even of a frozen encoder; ours only where asked, and never in eval mode).
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        ("lora", "depth_adapter", "drop_path", "rope_rescale", "gradient_checkpointing")
    )
    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim, self.depth, self.patch_size = config.embed_dim, config.depth, config.patch_size
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, config.num_registers, dim)) if config.num_registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = nn.ModuleDict({"proj": _patch_embedding(config)})
        self.rope_embed: RotaryPositions | None = None
        self.pos_embed: nn.Parameter | None = None
        if config.position_grid is None:
            head_dim = dim // config.num_heads
            self.rope_embed = RotaryPositions(head_dim, base=config.rope_base, dtype=config.rope_dtype)
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(config.position_grid), dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads=config.num_heads,
                ffn=config.ffn,
                ffn_hidden=config.ffn_hidden,
                qkv_bias=config.qkv_bias,
                mask_k_bias=config.mask_k_bias,
                norm_eps=config.norm_eps,
                layer_scale_init=config.layer_scale_init,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.local_cls_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.local_cls_norm else None
        self._initialise()

    def forward(
        self,
        images: Float[Tensor, "B P H W"],
        *,
        masks: Bool[Tensor, "B N"] | None = None,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        """Features of the blocks in `taps` (0-based; default: `default_taps`), shallow to deep.

        masks:      patches to replace by the mask token, row by row.
        tap_norm:   apply the final LayerNorm to every tap (SegDINO, MedDINOv3) or leave them raw (DINO-Med3D).
        num_slices: images that are slices of one case, side by side, for the depth adapters.
        images_at_once: so many go through a block at a time, all through its depth adapter: the same result with the
                    activations of few images inside blocks (in training: together with gradient_checkpointing).
        """
        chosen = self._chosen(taps)
        grid = self._grid(images)
        if len(images) % num_slices:
            fix = "give whole cases, all with the same number of slices."
            raise ConfigError(f"{len(images)} images are no cases of {num_slices} slices", fix=fix)
        outputs = self._run_blocks(
            images, grid, masks, keep={*chosen, self.depth - 1}, num_slices=num_slices, at_once=images_at_once
        )
        maps = []
        for tap in chosen:
            patches = outputs[tap][:, 1 + self.config.num_registers :]
            patches = self.norm(patches) if tap_norm else patches
            maps.append(
                patches.transpose(1, 2).reshape(len(images), -1, *grid)
            )  # (B, E, h, w), channels last in memory
        cls_token = self.norm(outputs[self.depth - 1][:, 0])
        return Features(tuple(maps), cls_token, (self.patch_size, self.patch_size))

    def default_taps(self) -> tuple[int, ...]:
        return default_taps(self.depth)

    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        return (self.embed_dim,) * len(taps)

    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        return (*self.blocks[self.depth - num_parts :], self.norm) if num_parts else ()

    def level(self, name: str) -> int:
        first, _, rest = name.partition(".")
        return int(rest.partition(".")[0]) if first == "blocks" else self.depth - 1 if first == "norm" else -1

    def idle_parameters(self) -> tuple[nn.Parameter, ...]:
        """The mask token and the norm of self-supervised training."""
        return (self.mask_token, *(() if self.local_cls_norm is None else self.local_cls_norm.parameters()))

    def tokens(
        self, images: Float[Tensor, "B P H W"], *, masks: Bool[Tensor, "B N"] | None = None, local: bool = False
    ) -> Tokens:
        """Class token, registers and patches (row by row) after the final norm.

        local: small crops of self-supervised training, whose class token has a norm of its own in some backbones
               (`local_cls_norm`; while training only).
        """
        last = self.depth - 1
        raw = self._run_blocks(images, self._grid(images), masks, keep={last})[last]
        x = self.norm(raw)
        cls, registers, patches = x.split((1, self.config.num_registers, x.shape[1] - 1 - self.config.num_registers), 1)
        if local and self.training and self.local_cls_norm is not None:
            cls = self.local_cls_norm(raw[:, :1])
        return Tokens(cls[:, 0], registers, patches)

    @torch.no_grad()
    def widen_input(self, num_planes: int) -> None:
        """Let the patch embedding read `num_planes` (odd, 3 or more) slices and train, whatever else is frozen.

        It starts as the pretrained one: its three planes go to the central three slices (previous, current, next), the
        others start at zero. This is the learned multi-slice embedding that DINO-Med3D's first stage claims
        (arXiv 2606.18886); its release has only fixed neighbours in the three planes (dossier 1.3).
        """
        if self.config.in_planes not in (3, num_planes) or num_planes < 3 or num_planes % 2 == 0:
            raise ConfigError(
                f"a patch embedding of {self.config.in_planes} planes cannot be made one of {num_planes}",
                fix="start from one of 3; give an odd number from 3.",
            )
        old = self.patch_embed["proj"]
        assert isinstance(old, nn.Conv2d) and old.bias is not None
        if num_planes != self.config.in_planes:
            self.config = self.config.model_copy(update={"in_planes": num_planes})
            wide = _patch_embedding(self.config).to(old.weight)
            first = num_planes // 2 - 1
            wide.weight.zero_()
            wide.weight[:, first : first + 3] = old.weight
            wide.bias = old.bias
            self.patch_embed["proj"] = wide
        self.patch_embed.requires_grad_(True)

    def _run_blocks(
        self,
        images: Tensor,
        grid: tuple[int, int],
        masks: Tensor | None,
        keep: set[int],
        num_slices: int = 1,
        at_once: int | None = None,
    ) -> dict[int, Tensor]:
        x = self._embed(images, grid, masks)
        rotation = self._rotation(grid)
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if at_once is None or at_once >= len(x):
                x = self._run(block, x, rotation, self.drop_path, num_slices)
            else:
                parts = [
                    self._run(block.within_slices, part, rotation, self.drop_path) for part in torch.split(x, at_once)
                ]
                x = self._run(block.across_slices, torch.cat(parts), num_slices)
            if index in keep:
                kept[index] = x
        return kept

    def _run(self, layer: Callable[..., Tensor], x: Tensor, *settings: Any) -> Tensor:
        """The layer's output; under gradient checkpointing its activations are computed again when needed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(layer, x, *settings, use_reentrant=False)
            return recomputed
        return layer(x, *settings)

    def _embed(self, images: Tensor, grid: tuple[int, int], masks: Tensor | None) -> Tensor:
        """Class token, registers, patches; learned positions added to the class token and the patches."""
        if images.shape[1] != self.config.in_planes:
            told = f"images have {images.shape[1]} planes, but the backbone reads {self.config.in_planes}"
            raise ConfigError(told, fix="choose an input builder that makes as many, or call widen_input.")
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, N, E)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        cls: Tensor = self.cls_token
        if self.pos_embed is not None:
            cls = cls + self.pos_embed[:, :1]
            patches = patches + self._positions(grid)
        prefix = cls if self.storage_tokens is None else torch.cat((cls, self.storage_tokens), dim=1)
        return torch.cat((prefix.expand(len(images), -1, -1), patches), dim=1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """DINOv2's learned positions of the patches, (1, N, E).

        On another grid than the stored one they are resized bicubically without antialiasing, outer edges agreeing.
        (DINOv2's own code computes the scale from grid + 0.1, an old workaround for rounding that stretches the
        positions by 0.1 / grid; we resize to the exact grid.)
        """
        assert self.pos_embed is not None and self.config.position_grid is not None
        positions = self.pos_embed[:, 1:]
        if grid == self.config.position_grid:
            return positions
        plane = positions.transpose(1, 2).reshape(1, -1, *self.config.position_grid).float()  # (1, E, rows, columns)
        plane = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False, antialias=False)
        return plane.flatten(2).transpose(1, 2).to(positions.dtype)

    def _rotation(self, grid: tuple[int, int]) -> Rotation | None:
        if self.rope_embed is None:
            return None
        scale = 1.0
        if self.training and self.rope_rescale is not None:
            scale = self.rope_rescale ** float(torch.rand(()) * 2 - 1)
        rotation: Rotation = self.rope_embed(grid, scale=scale)
        return rotation

    def _initialise(self) -> None:
        """Random weights as in DINOv3's training: linear layers truncated normal 0.02, tokens normal 0.02, mask 0."""
        nn.init.zeros_(self.mask_token)
        nn.init.normal_(self.cls_token, std=0.02)
        for tokens in (self.storage_tokens, self.pos_embed):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_state(cls, config: ViTConfig, state: Mapping[str, Tensor]) -> "ViT":
        """A backbone in eval mode that holds the tensors of a complete state (see voxdino.models.layouts), uncopied."""
        with torch.device("meta"):
            vit = cls(config)
        vit.load_state_dict(state, strict=True, assign=True)
        return vit.eval()


def _patch_embedding(config: ViTConfig) -> nn.Conv2d:
    return nn.Conv2d(config.in_planes, config.embed_dim, config.patch_size, config.patch_size)
