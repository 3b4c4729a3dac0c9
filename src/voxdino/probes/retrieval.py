"""Image retrieval: are the nearest images in feature space of the same class?"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from voxdino.core.errors import DatasetError
from voxdino.core.records import Record
from voxdino.probes.knn import CHUNK

Labels = Int[Tensor, " _"] | Int[Tensor, "_ K"]


class RetrievalScores(Record):
    """Means over the queries that have a match in the gallery.

    recall:            k -> share of queries with a match among the k nearest.
    average_precision: k -> mean of the average precision of the k nearest, as a share of the best that k could give.
    num_unmatched:     queries left out because no image of the gallery matches.
    """

    recall: dict[int, float]
    average_precision: dict[int, float]
    num_queries: int
    num_unmatched: int


def query_scores(
    queries: Float[Tensor, "Q E"],
    query_labels: Labels,
    gallery: Float[Tensor, "N E"],
    gallery_labels: Labels,
    *,
    ks: Sequence[int] = (1, 5, 10),
    query_groups: Sequence[str | None] | None = None,
    gallery_groups: Sequence[str | None] | None = None,
) -> dict[str, Float[Tensor, " Q"]]:
    """Of each query "recall@k": 1 with a match among the k nearest, else 0; "map@k": its average precision.

    NaN for queries without any match in the gallery; arguments as of `retrieval_scores`.
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


def retrieval_scores(
    queries: Float[Tensor, "Q E"],
    query_labels: Labels,
    gallery: Float[Tensor, "N E"],
    gallery_labels: Labels,
    *,
    ks: Sequence[int] = (1, 5, 10),
    query_groups: Sequence[str | None] | None = None,
    gallery_groups: Sequence[str | None] | None = None,
) -> RetrievalScores:
    """Recall and mean average precision at each k, neighbours by cosine similarity.

    Images match that have the same class, or at least one label in common (labels (N, K) of 0 and 1).
    groups: images of the query's own patient are no finds; without groups every image of the gallery counts.
    Errors: DatasetError where no query has a match.
    """
    groups = {"query_groups": query_groups, "gallery_groups": gallery_groups}
    scores = query_scores(queries, query_labels, gallery, gallery_labels, ks=ks, **groups)
    is_known = ~scores[f"recall@{ks[0]}"].isnan()
    if not bool(is_known.any()):
        raise DatasetError("no query has a match in the gallery", fix="give a gallery with the classes of the queries.")
    return RetrievalScores(
        recall={k: float(scores[f"recall@{k}"].nanmean()) for k in ks},
        average_precision={k: float(scores[f"map@{k}"].nanmean()) for k in ks},
        num_queries=int(is_known.sum()),
        num_unmatched=int((~is_known).sum()),
    )


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
