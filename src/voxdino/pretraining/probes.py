"""How good features are without training the backbone: nearest neighbours, linear probes, effective rank.

Everything is computed from frozen features, on the CPU, and is the same for the same features whatever the machine's
load or the number of batches. Probes read a `Backbone` in eval mode and leave it as it is.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from voxdino.core.errors import DatasetError
from voxdino.core.records import Record
from voxdino.core.safe_files import require_file
from voxdino.models.backbones.base import Backbone
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD
from voxdino.pretraining.fitting import (
    HELD_OUT,
    STRENGTHS,
    choose,
    device_of,
    fit_logistic,
    linear_logits,
    require_eval,
    spread,
    standardised,
)
from voxdino.pretraining.measures import effective_rank as effective_rank
from voxdino.pretraining.measures import feature_spread as feature_spread
from voxdino.pretraining.measures import target_entropy as target_entropy
from voxdino.pretraining.patch_probe import PatchProbe as PatchProbe
from voxdino.pretraining.patch_probe import patch_probe as patch_probe

CLASS_SIDE = 112  # pixels that a picture to classify is enlarged to, or the nearest multiple of the patch

_CHUNK = 1024  # features compared with all neighbours at a time


def knn_accuracy(
    train_features: Float[Tensor, "N E"],
    train_labels: Int[Tensor, " N"],
    features: Float[Tensor, "M E"],
    labels: Int[Tensor, " M"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of features whose k nearest neighbours of the training part vote for their class.

    As in DINO (arXiv 2104.14294): neighbours by cosine similarity, each counts exp(similarity / temperature); k is at
    most N, and of equal votes the smaller label wins.
    """
    assert k > 0 and temperature > 0, "k and temperature are above 0"
    known, classes = torch.unique(train_labels.cpu(), return_inverse=True)
    neighbours = F.normalize(train_features.detach().cpu().float(), dim=1)
    num_right = 0
    for part, truth in zip(features.detach().cpu().split(_CHUNK), labels.cpu().split(_CHUNK), strict=True):
        nearness = F.normalize(part.float(), dim=1) @ neighbours.T  # (m, N)
        nearest, places = nearness.topk(min(k, len(neighbours)), dim=1)
        weights = ((nearest - 1) / temperature).exp()  # at most 1: no overflow at small temperatures
        votes = torch.zeros(len(part), len(known)).scatter_add_(1, classes[places], weights)
        num_right += int((known[votes.argmax(1)] == truth).sum())
    return num_right / len(labels)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of frozen features, and how well it does.

    accuracy: of the features it was not fitted to.
    strength: of the penalty, chosen for `held_out` (strength -> accuracy there).
    classes:  the labels, in the order of the rows of `weight`, which reads features less `mean`, divided by `sd`.
    """

    accuracy: float
    strength: float
    held_out: dict[float, float]
    classes: tuple[int, ...]
    weight: Float[Tensor, "K E"]
    bias: Float[Tensor, " K"]
    mean: Float[Tensor, " E"]
    sd: Float[Tensor, " E"]

    def predict(self, features: Float[Tensor, "M E"]) -> Int[Tensor, " M"]:
        """The label of each."""
        logits = F.linear((features.detach().cpu().double() - self.mean) / self.sd, self.weight, self.bias)
        return torch.tensor(self.classes)[logits.argmax(1)]


def linear_probe(
    train_features: Float[Tensor, "N E"],
    train_labels: Int[Tensor, " N"],
    features: Float[Tensor, "M E"],
    labels: Int[Tensor, " M"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = 500,
) -> LinearProbe:
    """Accuracy of a regularised multinomial logistic regression (float64, L-BFGS) of standardised features.

    The strength of the penalty is the one of the best accuracy on a held-back fifth of the training part, drawn evenly
    over the classes (of equals the one with the smaller cross-entropy); the classifier is then fitted to all of it.
    Labels that the training part does not have count as wrong.
    Errors: DatasetError for fewer than two classes or ten training features.
    """
    known, classes = torch.unique(train_labels.cpu(), return_inverse=True)
    if len(known) < 2 or len(classes) < 2 * HELD_OUT:
        fact = f"{len(classes)} examples of {len(known)} classes are too few to fit a classifier and choose its penalty"
        raise DatasetError(fact, fix=f"give {2 * HELD_OUT} examples of two classes at least.")
    x, mean, sd = standardised(train_features.detach().cpu().double())
    held = _held_out(classes)
    found = choose(
        strengths,
        lambda strength, start: fit_logistic(
            x[~held], classes[~held], len(known), strength, start=start, max_iterations=max_iterations
        ),
        lambda weights: _score(linear_logits(x[held], weights), classes[held]),
    )
    weights = fit_logistic(x, classes, len(known), found.strength, start=found.weights, max_iterations=max_iterations)
    result = LinearProbe(
        accuracy=math.nan,
        strength=found.strength,
        held_out={strength: score[0] for strength, score in found.scores.items()},
        classes=tuple(known.tolist()),
        weight=weights[:, :-1],
        bias=weights[:, -1],
        mean=mean,
        sd=sd,
    )
    accuracy = float((result.predict(features) == labels.cpu()).double().mean())
    return replace(result, accuracy=accuracy)


@dataclass(frozen=True, eq=False)
class LabelledPictures:
    """8-bit pictures, grey (C = 1) or colour, and the class of each."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Shaped[np.ndarray, " N"]

    def some(self, number: int | None) -> "LabelledPictures":
        """So many of them, evenly spread; all where there are fewer."""
        places = spread(len(self.labels), number)
        return LabelledPictures(self.images[places], self.labels[places])


@dataclass(frozen=True)
class ClassificationSet:
    """Pictures to train on, to choose with, and to test on."""

    train: LabelledPictures
    val: LabelledPictures
    test: LabelledPictures


def classification_set(path: str | PathLike[str]) -> ClassificationSet:
    """A data set of MedMNIST: an .npz file with images and labels for train, val and test (medmnist.com).

    Errors: DatasetError for other files, volumes, and sets with several labels per picture. No pickle is opened.
    """
    require_file(path, kind=DatasetError)
    fix = "give a set of pictures of MedMNIST, such as pneumoniamnist.npz."
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise DatasetError(f"cannot be read as .npz ({str(error)[:120]})", where=path, fix=fix) from error
    parts = []
    for part in ("train", "val", "test"):
        images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
        if images is None or labels is None:
            fact = f"has no {part}_images or {part}_labels"
            raise DatasetError(f"{fact} (found: {', '.join(sorted(arrays)[:6])})", where=path, fix=fix)
        is_picture = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3))
        if not is_picture or not images.size:
            told = f"{part}_images is {images.dtype} of {' x '.join(map(str, images.shape))}, no 8-bit pictures"
            raise DatasetError(told, where=path, fix=fix)
        if labels.size != len(images) or labels.dtype.kind not in "iub":
            told = f"{part}_labels has {labels.size} numbers for {len(images)} pictures"
            raise DatasetError(told, where=path, fix="give a set with one class per picture.")
        pictures = images[..., None] if images.ndim == 3 else images
        parts.append(LabelledPictures(np.ascontiguousarray(pictures), labels.reshape(-1).astype(np.int64)))
    return ClassificationSet(*parts)


@torch.no_grad()
def class_features(
    backbone: Backbone, images: UInt8[np.ndarray, "N H W C"], *, side: int | None = None, batch_size: int = 64
) -> Float[Tensor, "N E"]:
    """Class tokens (after the final norm, float32, on the CPU) of pictures scaled as ImageNet and resized.

    side: pixels, a multiple of the backbone's patch; default: the one nearest to 112.
    """
    require_eval(backbone)
    patch = backbone.patch_size
    size = side or max(1, round(CLASS_SIDE / patch)) * patch
    found = []
    for first in range(0, len(images), batch_size):
        pictures = torch.from_numpy(images[first : first + batch_size]).movedim(-1, 1).float() / 255
        planes = (pictures.expand(-1, 3, -1, -1) - _column(IMAGENET_MEAN)) / _column(IMAGENET_SD)
        resized = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
        found.append(backbone(resized.to(device_of(backbone))).cls_token.float().cpu())
    return torch.cat(found)


class ClassProbe(Record):
    """Accuracy on the test pictures of a labelled set, from frozen class tokens.

    knn: of the nearest neighbours; linear: of logistic regression; rank: effective rank of the test features.
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
) -> ClassProbe:
    """Both probes of a set of pictures; `num_train` and `num_test` take evenly spread parts of it."""
    train, test = pictures.train.some(num_train), pictures.test.some(num_test)
    known, new = (class_features(backbone, part.images, side=side, batch_size=batch_size) for part in (train, test))
    known_labels, labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    linear = linear_probe(known, known_labels, new, labels)
    return ClassProbe(
        knn=knn_accuracy(known, known_labels, new, labels),
        linear=linear.accuracy,
        strength=linear.strength,
        rank=effective_rank(new),
        num_train=len(known),
        num_test=len(new),
    )


def _score(logits: Tensor, classes: Tensor) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    return float((logits.argmax(1) == classes).double().mean()), float(F.cross_entropy(logits, classes))


def _held_out(classes: Int[Tensor, " N"]) -> Tensor:
    """(N,) every fifth example, class by class, in a fixed random order."""
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(classes)))
    ordered = shuffled[torch.argsort(classes[shuffled], stable=True)]
    held = torch.zeros(len(classes), dtype=torch.bool)
    held[ordered[HELD_OUT // 2 :: HELD_OUT]] = True
    return held


def _column(values: Sequence[float]) -> Tensor:
    """(3, 1, 1)."""
    return torch.tensor(values)[:, None, None]
