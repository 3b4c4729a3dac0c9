"""From the tokens, slices or patches of a case to one vector: a new pooling is one class and one line in the table."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

HIDDEN = 128  # of the gate, as published


class Pooling(nn.Module, ABC):
    """Interface: (B, S, E) instances and which of them there are, to (B, E). Attention starts even: as the mean."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    @abstractmethod
    def forward(self, bags: Float[Tensor, "B S E"], present: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
        """Every bag has one instance at least; what is not present has no effect."""


class MeanPooling(Pooling):
    """The average slice, as in the benchmark's 3-D probe (arXiv 2509.06467)."""

    def forward(self, bags: Float[Tensor, "B S E"], present: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
        weights = present.to(bags.dtype)
        return torch.einsum("bse,bs->be", bags * present[..., None], weights / weights.sum(1, keepdim=True))


class MaxPooling(Pooling):
    """The largest value of each channel."""

    def forward(self, bags: Float[Tensor, "B S E"], present: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
        return bags.masked_fill(~present[..., None], -torch.inf).amax(1)


class AttentionPooling(Pooling):
    """One learned query: instances that are like it count more (attentive probing; one query makes keys needless)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self.query = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, bags: Float[Tensor, "B S E"], present: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
        return _weighted(bags, bags @ self.query / self.embed_dim**0.5, present)


class GatedAttention(Pooling):
    """ABMIL: weights from a gated layer of each instance (Ilse et al., arXiv 1802.04712, equation 9)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self.content, self.gate = nn.Linear(embed_dim, HIDDEN), nn.Linear(embed_dim, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, bags: Float[Tensor, "B S E"], present: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
        scores = self.score(self.content(bags).tanh() * self.gate(bags).sigmoid()).squeeze(-1)
        return _weighted(bags, scores, present)


def _weighted(
    bags: Float[Tensor, "B S E"], scores: Float[Tensor, "B S"], present: Bool[Tensor, "B S"]
) -> Float[Tensor, "B E"]:
    weights = F.softmax(scores.masked_fill(~present, -torch.inf), dim=1)
    return torch.einsum("bse,bs->be", bags, weights)


POOLINGS: dict[str, type[Pooling]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "attention": AttentionPooling,
    "abmil": GatedAttention,
}
