"""Probes of class tokens: how well the frozen features of whole pictures tell their classes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from voxdino.core.errors import DatasetError
from voxdino.core.records import Record
from voxdino.models.backbones.base import Backbone
from voxdino.models.precision import autocast
from voxdino.preparation.case import SplitName
from voxdino.preparation.classification import ClassificationSet, load_image
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD
from voxdino.probes.fitting import device_of, require_eval, spread
from voxdino.probes.knn import knn_probabilities
from voxdino.probes.linear import fit_linear_probe
from voxdino.probes.measures import effective_rank

CLASS_SIDE = 112  # pixels that a picture to classify is enlarged to, or the nearest multiple of the patch


@torch.no_grad()
def class_features(
    backbone: Backbone,
    pictures: Sequence[UInt8[np.ndarray, "_ H W"]],
    *,
    side: int | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> Float[Tensor, "N E"]:
    """Class tokens (after the final norm, float32, on the CPU) of 8-bit pictures scaled as ImageNet and resized.

    pictures: grey ones (1, H, W) or colour (3, H, W).
    side:     pixels, a multiple of the backbone's patch; default: the one nearest to 112.
    bf16:     the backbone computes in bfloat16.
    """
    require_eval(backbone)
    patch = backbone.patch_size
    size = side or max(1, round(CLASS_SIDE / patch)) * patch
    device, found = device_of(backbone), []
    for first in range(0, len(pictures), batch_size):
        planes = [_resized(one, size) for one in pictures[first : first + batch_size]]
        with autocast(device, bf16):
            found.append(backbone(torch.stack(planes).to(device)).cls_token.float().cpu())
    return torch.cat(found)


class ClassProbe(Record):
    """Accuracy on the test pictures of a labelled set, from frozen class tokens.

    knn: of the nearest neighbours; linear: of logistic regression, whose strength the validation pictures choose; rank:
    effective rank of the test features.
    """

    knn: float
    linear: float
    strength: float
    rank: float
    num_train: int
    num_test: int


def class_probe(
    pictures: ClassificationSet,
    backbone: Backbone,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    side: int | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> ClassProbe:
    """Both probes of a set of pictures; `num_train` (also of val) and `num_test` take evenly spread parts of it;
    bf16: the backbone computes in bfloat16.

    Errors: DatasetError for volumes and for sets with several labels per picture.
    """
    if pictures.kind == "multi" or pictures.ndim != 2:
        fix = "give a set of pictures with one class each, such as pneumoniamnist.npz."
        raise DatasetError("holds volumes, or several labels per picture.", where=pictures.path, fix=fix)

    def read(split: SplitName, number: int | None) -> tuple[Tensor, Tensor]:
        places = spread(len(pictures.splits[split]), number)
        images = [load_image(pictures.splits[split][place]).array for place in places]
        labels = torch.from_numpy(pictures.labels(split)[places])
        return class_features(backbone, images, side=side, batch_size=batch_size, bf16=bf16), labels

    (known, known_labels), (new, labels) = read("train", num_train), read("test", num_test)
    linear = fit_linear_probe(known, known_labels, *read("val", num_train), num_classes=pictures.num_classes)
    votes = knn_probabilities(known, known_labels, new, num_classes=pictures.num_classes)
    return ClassProbe(
        knn=accuracy(votes, labels),
        linear=accuracy(linear.probabilities(new), labels),
        strength=linear.strength,
        rank=effective_rank(new),
        num_train=len(known),
        num_test=len(new),
    )


def accuracy(probabilities: Float[Tensor, "N K"], labels: Tensor) -> float:
    """Share of cases whose largest probability is that of their class; of equals the smaller class counts."""
    return float((probabilities.argmax(1) == labels).double().mean())


def _resized(picture: UInt8[np.ndarray, "_ H W"], side: int) -> Float[Tensor, "3 S S"]:
    planes = torch.from_numpy(picture.astype(np.float32) / 255).expand(3, -1, -1)
    scaled = (planes - _column(IMAGENET_MEAN)) / _column(IMAGENET_SD)
    return F.interpolate(scaled[None], size=(side, side), mode="bilinear", antialias=True)[0]


def _column(values: Sequence[float]) -> Tensor:
    """(3, 1, 1)."""
    return torch.tensor(values)[:, None, None]
