"""Zero-shot matching between cases: the same place in another patient is where the features are most alike.

Feature maps (E, *grid) cover the whole image: token i of n reaches from i / n to (i + 1) / n of its side. Points are in
voxels, in array order; the centre of the first voxel is 0.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from voxdino.probes.knn import knn_probabilities


def match_points(
    source: Float[Tensor, "E *grid"],
    target: Float[Tensor, "E *other"],
    points: Float[Tensor, "P A"],
    *,
    source_shape: Sequence[int],
    target_shape: Sequence[int],
) -> Float[Tensor, "P A"]:
    """Where each point of the source image lies in the target image: the centre of the token that is most like it.

    The source's features are interpolated linearly at the point; likeness is the cosine.
    *_shape: voxels of the two images.
    """
    asked = F.normalize(_features_at(source, points, source_shape), dim=1)  # (P, E)
    tokens = F.normalize(target.flatten(1).float(), dim=0)  # (E, N)
    best = (asked @ tokens).argmax(1)
    places = torch.stack(torch.unravel_index(best, target.shape[1:]), dim=1)  # (P, A)
    scale = torch.tensor([voxels / n for voxels, n in zip(target_shape, target.shape[1:], strict=True)])
    return (places + 0.5) * scale - 0.5


def class_shares(label: Int[Tensor, "*spatial"], grid: Sequence[int], *, num_classes: int) -> Float[Tensor, "N K"]:
    """How much of each token of a grid each class fills, tokens in array order."""
    pool = (nn.AdaptiveAvgPool3d if label.ndim == 3 else nn.AdaptiveAvgPool2d)(tuple(grid))
    # one class at a time: large volumes of many fit into memory
    return torch.stack([pool((label == index).float()[None]).flatten() for index in range(num_classes)], dim=1)


def transfer_labels(
    source: Float[Tensor, "E *grid"],
    target: Float[Tensor, "E *other"],
    shares: Float[Tensor, "N K"],
    *,
    target_shape: Sequence[int],
    k: int = 5,
    temperature: float = 0.07,
) -> Int[Tensor, "*voxels"]:
    """The source's label map brought to the target image: its tokens vote as in `knn_probabilities`.

    shares: of the source's tokens, by `class_shares`; a token counts for each class as much as the class fills it.
    Votes are interpolated to voxels; the largest wins.
    """
    votes = knn_probabilities(
        source.flatten(1).T, shares, target.flatten(1).T, num_classes=shares.shape[1], k=k, temperature=temperature
    )
    mode = "trilinear" if len(target_shape) == 3 else "bilinear"
    most, winner = torch.full(tuple(target_shape), -1.0), torch.zeros(tuple(target_shape), dtype=torch.int64)
    for index, column in enumerate(votes.T.float()):  # one at a time, as there
        share = F.interpolate(column.reshape(1, 1, *target.shape[1:]), size=tuple(target_shape), mode=mode)[0, 0]
        winner[share > most] = index
        most = torch.maximum(most, share)
    return winner


def distances_mm(
    found: Float[Tensor, "P A"], truth: Float[Tensor, "P A"], spacing: Sequence[float]
) -> Float[Tensor, " P"]:
    """How far found points lie from the true ones. spacing: mm per voxel, in array order."""
    return ((found - truth) * torch.tensor(spacing)).square().sum(1).sqrt()


def mask_centre(label: Int[Tensor, "*spatial"], index: int) -> Float[Tensor, " A"]:
    """The centre of mass of a class, in voxels; NaN where it is absent."""
    return (label == index).nonzero().float().mean(0)


def _features_at(
    features: Float[Tensor, "E *grid"], points: Float[Tensor, "P A"], shape: Sequence[int]
) -> Float[Tensor, "P E"]:
    """Linear interpolation between the centres of tokens; beyond the outermost ones theirs."""
    where = (points + 0.5) * 2 / torch.tensor(shape) - 1  # in [-1, 1] from edge to edge
    lines = where.flip(1).reshape(1, *[1] * (features.ndim - 2), len(points), features.ndim - 1).float()
    sampled = F.grid_sample(features[None].float(), lines, align_corners=False, padding_mode="border")
    return sampled.reshape(len(features), -1).T
