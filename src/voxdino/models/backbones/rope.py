"""Rotary positions on a two-dimensional token grid, as DINOv3 uses them (dossier 5.4)."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

RopeDtype = Literal["float32", "bfloat16"]


class Rotation(NamedTuple):
    """Sine and cosine of every patch's angles, (n, head_dim) each."""

    sin: Float[Tensor, "n d"]
    cos: Float[Tensor, "n d"]


def rope_periods(head_dim: int, *, base: float = 100.0, dtype: RopeDtype = "float32") -> Float[Tensor, " p"]:
    """base ** (2 i / (head_dim / 2)) for i < head_dim / 4, rounded to `dtype`, kept as float32."""
    exponents = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim / 2) * 2
    return (base**exponents).to(getattr(torch, dtype)).float()


class RotaryPositions(nn.Module):
    """Axial, not learned: patch centres in [-1, 1] along each axis, turned at head_dim / 4 periods.

    The periods are part of the weights: files that store them (in bfloat16 rounding, say) are used as they are.
    `dtype` is the precision of angles and rotation, whatever autocast does around them.
    """

    periods: Tensor

    def __init__(self, head_dim: int, *, base: float = 100.0, dtype: RopeDtype = "float32") -> None:
        super().__init__()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.register_buffer("periods", rope_periods(head_dim, base=base, dtype=dtype))

    def forward(self, grid: tuple[int, int], *, scale: float = 1.0) -> Rotation:
        """Angles of the patches of a (rows, columns) grid, row by row; `scale` multiplies the coordinates."""
        axes = [(torch.arange(0.5, n, dtype=self.dtype, device=self.periods.device) / n * 2 - 1) * scale for n in grid]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (n, 2), y then x
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods.to(self.dtype)  # (n, 2, head_dim / 4)
        angles = angles.flatten(1).tile(2)  # (n, head_dim)
        return Rotation(angles.sin(), angles.cos())


def rotate(x: Float[Tensor, "*heads N d"], rotation: Rotation) -> Float[Tensor, "*heads N d"]:
    """Turn the queries or keys of the patches; the class token and registers before them stay.

    All tokens, the unturned ones too, pass through the rotation's precision: MedDINOv3's numbers need it.
    """
    num_prefix, half = x.shape[-2] - rotation.sin.shape[0], x.shape[-1] // 2
    sin = F.pad(rotation.sin[:, :half], (0, 0, num_prefix, 0))  # both halves are turned by the same angles
    cos = F.pad(rotation.cos[:, :half], (0, 0, num_prefix, 0), value=1.0)
    first, second = (part.to(sin.dtype, memory_format=torch.contiguous_format) for part in x.chunk(2, dim=-1))
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)), dim=-1)
