"""The projection head of self-distillation: from a token to logits over prototypes."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_INIT_SD = 0.02


class ProjectionHead(nn.Module):
    """MLP with GELU, L2 norm, linear layer without bias (dossier 5.7): DINO's for class tokens, iBOT's for patches.

    Keys are those of the official checkpoints (dossier 5.3): `mlp.{0,2,4}.{weight,bias}`, `last_layer.weight`.
    Weights start from a truncated normal of sd 0.02, biases from 0; the last layer has no weight norm.

    num_layers: linear layers of the MLP, the last one to `bottleneck_dim`.
    """

    def __init__(
        self, embed_dim: int, num_prototypes: int, hidden_dim: int, bottleneck_dim: int, num_layers: int = 3
    ) -> None:
        super().__init__()
        widths = [embed_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])  # no GELU after the last one
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Start anew, from torch's global generator; also for a head built without storage (the meta device)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_SD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Float[Tensor, "*tokens E"]) -> Float[Tensor, "*tokens K"]:
        """Logits; a token's length does not matter after the MLP, only its direction."""
        hidden = self.mlp(tokens)
        unit = F.normalize(hidden.float(), dim=-1).to(hidden.dtype)
        logits: Tensor = self.last_layer(unit)
        return logits
