"""The seam of every model: what a backbone gives a decoder, and what a model gives the rest of the program."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Patch features of a batch, shallow to deep: all a decoder may know about a backbone.

    maps:       one (B, E, *grid) tensor per chosen layer; all share one grid.
    cls_token:  (B, E), after the final norm.
    patch_size: voxels per token along each spatial axis.
    """

    maps: tuple[Float[Tensor, "B E *grid"], ...]
    cls_token: Float[Tensor, "B E"]
    patch_size: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch.

    logits: (B, K, *spatial), before softmax (or sigmoid for regions), one per voxel of the crop that went in.
    """

    logits: Float[Tensor, "B K *spatial"]
