"""Depth adapters: small layers inside the blocks of a two-dimensional backbone that let slices of a volume talk.

The idea of DINO-Med3D's second stage (arXiv 2606.18886: "lightweight 3-D adapters" in the frozen backbone; dossier 1.1
and 1.9). Its release has none of them: what it calls a 3-D adapter comes after the backbone (decoder "upernet3d").
"""

from collections.abc import Collection

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.blocks import Block
from voxdino.models.backbones.vit import ViT


class DepthAdapter(nn.Module):
    """up(GELU(along_depth(down(x)))), which a block adds to its tokens; `up` starts at zero, and changes nothing.

    `along_depth` is a depth-wise convolution over a token and the tokens at its place one slice before and after, zeros
    beyond the ends. The class token and registers take part like patches.
    """

    def __init__(self, dim: int, *, width: int = 64) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width)
        self.along_depth = nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=width)
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "S N E"], num_slices: int) -> Float[Tensor, "S N E"]:
        """`x`: tokens of the slices of one case or several, those of a case side by side, `num_slices` of each."""
        narrow = self.down(x).unflatten(0, (-1, num_slices))  # (B, D, N, width): channels last
        mixed = self.along_depth(narrow.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(0, 1)  # (B * D, N, width)
        added: Tensor = self.up(F.gelu(mixed))
        return added


def add_depth_adapters(vit: ViT, *, width: int = 64, blocks: Collection[int] | None = None) -> int:
    """Put an adapter into each of `blocks` (0-based; None: all); returns their number.

    Which other weights train is left as it is: freeze the backbone, or call `add_lora`, before. Parameters are named
    `blocks.N.depth_adapter.{down,along_depth,up}.{weight,bias}`; the names of the backbone's own stay.
    """
    chosen = set(range(vit.depth) if blocks is None else blocks)
    if width < 1 or not chosen or not chosen <= set(range(vit.depth)):
        raise ConfigError(
            f"depth adapters of width {width} in blocks {sorted(chosen)} cannot be built",
            fix=f"the width is at least 1, blocks are from 0 to {vit.depth - 1}.",
        )
    for index in chosen:
        block = vit.blocks[index]
        assert isinstance(block, Block)
        device = block.norm2.weight.device
        block.depth_adapter = DepthAdapter(vit.embed_dim, width=width).to(device).train(block.training)
    return len(chosen)
