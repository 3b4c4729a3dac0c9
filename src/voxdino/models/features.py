"""The seam of every model: what a backbone gives a decoder, and what a model gives the rest of the program."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Patch features of a batch, shallow to deep: all a decoder may know about a backbone.

    maps:       one (B, E, *grid) tensor per chosen layer; all share one grid, not always the channels.
    cls_token:  (B, E), after the final norm.
    patch_size: voxels per token along each spatial axis.
    """

    maps: tuple[Float[Tensor, "B _ *grid"], ...]
    cls_token: Float[Tensor, "B E"]
    patch_size: tuple[int, ...]

    def as_volume(self, num_slices: int) -> "Features":
        """Of slices side by side, (B * D, E, h, w), the volumes they are: (B, E, D, h, w), a token one slice deep."""
        maps = tuple(slices_to_volume(one, num_slices) for one in self.maps)
        num_images, width = self.cls_token.shape
        cls_token = self.cls_token.reshape(num_images // num_slices, num_slices, width).mean(1)
        return Features(maps, cls_token, (1, *self.patch_size))


def slices_to_volume(slices: Tensor, num_slices: int) -> Tensor:
    """(B * D, X, h, w) -> (B, X, D, h, w)."""
    return slices.reshape(-1, num_slices, *slices.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch.

    logits: (B, K, *spatial), before softmax (or sigmoid for regions), one per voxel of the crop that went in.
    """

    logits: Float[Tensor, "B K *spatial"]
