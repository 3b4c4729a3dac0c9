"""Linear probe: how much the features say by themselves."""

from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.decoders.base import Decoder
from voxdino.models.features import Features


class PerToken(nn.Linear):
    """A linear layer over the channels of a map (B, E, *grid)."""

    def forward(self, x: Float[Tensor, "B E *grid"]) -> Float[Tensor, "B K *grid"]:
        out: Tensor = super().forward(x.movedim(1, -1))  # (B, *grid, K)
        return out.movedim(-1, 1)


class LinearDecoder(Decoder):
    """Project every token of the last map to logits. In 2-D this is the proxy head of DINO-Med3D (dossier 1.3)."""

    num_taps = 1
    num_dims = (2, 3)

    def __init__(self, *, embed_dims: tuple[int, ...], num_outputs: int | None) -> None:
        super().__init__()
        self.hidden_width = embed_dims[-1]
        self.to_logits: nn.Module = nn.Identity() if num_outputs is None else PerToken(embed_dims[-1], num_outputs)

    def hidden(self, features: Features, detail: Tensor | None = None) -> Float[Tensor, "B E *grid"]:
        return features.maps[-1]
