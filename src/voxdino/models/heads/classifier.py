"""The head that classifies a bag of features: pooling, then one linear layer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxdino.core.labels import LabelKind
from voxdino.models.heads.objectives import OBJECTIVES
from voxdino.models.heads.pooling import POOLINGS
from voxdino.models.registry import look_up


class ClassificationHead(nn.Module):
    """(B, S, E) instances to logits (B, O), which the objective of the labels' kind reads."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_classes: int,
        kind: LabelKind = "single",
        pooling: str = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.objective = OBJECTIVES[kind]
        num_outputs = self.objective.num_outputs(num_classes)
        self.pool = look_up(POOLINGS, pooling, kind="pooling")(embed_dim)
        self.to_logits = nn.Linear(embed_dim, 1 if self.objective.tied else num_outputs, bias=False)
        self.offsets = nn.Parameter(torch.zeros(num_outputs))
        nn.init.zeros_(self.to_logits.weight)

    def forward(self, bags: Float[Tensor, "B S E"], present: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B O"]:
        """present: which instances there are; None: all."""
        there = torch.ones(bags.shape[:2], dtype=torch.bool, device=bags.device) if present is None else present
        logits: Tensor = self.to_logits(self.pool(bags, there))
        return logits + self.offsets

    def probabilities(self, logits: Float[Tensor, "B O"]) -> Float[Tensor, "B K"]:
        return self.objective.probabilities(logits.float())
