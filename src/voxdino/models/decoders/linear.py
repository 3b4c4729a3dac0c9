"""Linear probe: how much the features say by themselves."""

from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.decoders.base import Decoder
from voxdino.models.features import Features


class LinearDecoder(Decoder):
    """Project every token of the last map to logits. In 2-D this is the proxy head of DINO-Med3D (dossier 1.3)."""

    num_taps = 1
    num_dims = (2, 3)

    def __init__(self, *, embed_dim: int, num_outputs: int) -> None:
        super().__init__()
        self.to_logits = nn.Linear(embed_dim, num_outputs)

    def native_logits(self, features: Features) -> Float[Tensor, "B K *grid"]:
        logits: Tensor = self.to_logits(features.maps[-1].movedim(1, -1))  # (B, *grid, K)
        return logits.movedim(-1, 1)
