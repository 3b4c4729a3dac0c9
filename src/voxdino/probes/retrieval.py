"""Image retrieval: are the nearest images in feature space of the same class?"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from voxdino.probes.knn import CHUNK

Labels = Int[Tensor, " _"] | Int[Tensor, "_ K"]


def retrieval_scores(
    queries: Float[Tensor, "Q E"],
    query_labels: Labels,
    gallery: Float[Tensor, "N E"],
    gallery_labels: Labels,
    *,
    ks: Sequence[int] = (1, 5, 10),
    query_groups: Sequence[str | None] | None = None,
    gallery_groups: Sequence[str | None] | None = None,
) -> dict[str, Float[Tensor, " Q"]]:
    """Of each query, by cosine similarity, "recall@k": 1 with a match among the k nearest, else 0; and "map@k": the
    average precision of the k nearest, as a share of the best that k could give. NaN where no image of the gallery
    matches; the means of the others are recall and mAP at k.

    Images match that have the same class, or at least one label in common (labels (N, K) of 0 and 1).
    groups: images of the query's own patient are no finds; without groups every image of the gallery counts.
    """
    units = F.normalize(gallery.detach().cpu().float(), dim=1)
    hits, totals = [], []
    for first in range(0, len(queries), CHUNK):
        part = slice(first, first + CHUNK)
        nearness = F.normalize(queries[part].detach().cpu().float(), dim=1) @ units.T  # (q, N)
        matches = _matches(query_labels[part].cpu(), gallery_labels.cpu())
        if query_groups is not None and gallery_groups is not None:
            own = _same(query_groups[part], gallery_groups)
            nearness, matches = nearness.masked_fill(own, -torch.inf), matches & ~own
        order = nearness.topk(min(max(ks), len(units)), dim=1).indices
        hits.append(matches.gather(1, order))
        totals.append(matches.sum(1))
    found, total = torch.cat(hits), torch.cat(totals)
    nowhere = total == 0
    recall = {f"recall@{k}": found[:, :k].any(1).double() for k in ks}
    precision = {f"map@{k}": _average_precision(found[:, :k], total.clamp(1, k)) for k in ks}
    return {name: values.masked_fill(nowhere, torch.nan) for name, values in (recall | precision).items()}


def _average_precision(found: Bool[Tensor, "Q k"], most: Int[Tensor, " Q"]) -> Float[Tensor, " Q"]:
    """most: hits that there can be."""
    precision = found.cumsum(1) / torch.arange(1, found.shape[1] + 1)
    return (precision * found).double().sum(1) / most


def _matches(one: Tensor, other: Tensor) -> Bool[Tensor, "Q N"]:
    if one.ndim == 2:
        return one.float() @ other.float().T > 0
    return one[:, None] == other[None]


def _same(one: Sequence[str | None], other: Sequence[str | None]) -> Bool[Tensor, "Q N"]:
    """Of the same group; images without one are of nobody's."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*one, *other)))}
    first, second = (torch.tensor([numbers[name] for name in names]) for names in (one, other))
    is_known = torch.tensor([name is not None for name in one])
    return (first[:, None] == second[None]) & is_known[:, None]
