"""Nearest neighbours vote, as in DINO (arXiv 2104.14294)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

CHUNK = 1024  # features compared with all neighbours at a time


def knn_probabilities(
    train_features: Float[Tensor, "N E"],
    train_labels: Int[Tensor, " N"] | Shaped[Tensor, "N K"],
    features: Float[Tensor, "M E"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "M K"]:
    """Share of the votes of the k nearest neighbours that each class (or each of several labels) has.

    Neighbours by cosine similarity, each counts exp(similarity / temperature); k is at most N.
    train_labels: classes (N,), or 0 and 1, or shares, of each (N, K).
    """
    assert k > 0 and temperature > 0, "k and temperature are above 0"
    labels = train_labels.cpu()
    votes = labels.double() if labels.ndim == 2 else F.one_hot(labels, num_classes).double()  # (N, K)
    neighbours = F.normalize(train_features.detach().cpu().float(), dim=1)
    shares = []
    for part in features.detach().cpu().split(CHUNK):
        nearest, places = (F.normalize(part.float(), dim=1) @ neighbours.T).topk(min(k, len(neighbours)), dim=1)
        weights = ((nearest - 1) / temperature).exp().double()  # at most 1: no overflow at small temperatures
        shares.append(torch.einsum("mk,mkc->mc", weights, votes[places]) / weights.sum(1, keepdim=True))
    return torch.cat(shares)
