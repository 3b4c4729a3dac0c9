"""Cells of classification tasks: probes of cached features of pictures, or of the slices of volumes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import Cell, TaskEntry
from voxdino.benchmark.images import ImageFeatures, View
from voxdino.benchmark.result import CellResult
from voxdino.core.errors import UsageError
from voxdino.core.safe_files import digest_json
from voxdino.evaluation.classification import classification_scores
from voxdino.evaluation.statistics import owners_of
from voxdino.preparation.case import SplitName
from voxdino.preparation.classification import ClassificationSet, LabelledCase, open_classification_set
from voxdino.preparation.made_record import source_digest
from voxdino.preparation.splits import deal
from voxdino.probes.fitting import spread
from voxdino.probes.knn import knn_probabilities
from voxdino.probes.linear import fit_linear_probe
from voxdino.probes.pooling import fit_bag_probe
from voxdino.probes.retrieval import retrieval_scores

NUM_PARTS = 5  # one of them chooses
CHOSEN_BY = "auroc"  # of CLASSIFICATION_METRICS, of the validation cases: chooses the resolution, and nothing else
MOST_ITERATIONS = 100  # of a linear fit with one penalty; of few, separable cases the last digits would take thousands


@dataclass(frozen=True, eq=False)
class Part:
    """Cases of one side of a split: features (N, S, E) and labels."""

    features: Float[Tensor, "N S E"]
    labels: Tensor

    @property
    def pictures(self) -> Float[Tensor, "N E"]:
        return self.features[:, 0]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A probe, and what it chose.

    answers:    its word on cases, as fields of a CellResult.   quality: the task's `chosen_by` of cases.
    validation: that of all validation cases.
    """

    answers: Callable[[Part], Mapping[str, Any]]
    quality: Callable[[Part], float]
    settings: Mapping[str, float | int | str | None]
    num_train: int = 0
    validation: float | None = None


Fit = Callable[[Part, Part, ClassificationSet, int], Fitted]


def linear(train: Part, validation: Part, known: ClassificationSet, seed: int) -> Fitted:
    """Logistic regression of the class token and the mean patch token; its penalty chosen on the validation cases."""
    probe = fit_linear_probe(
        train.pictures,
        train.labels,
        validation.pictures,
        validation.labels,
        kind=known.kind,
        num_classes=known.num_classes,
        max_iterations=MOST_ITERATIONS,
    )
    return _classifier(lambda part: probe.probabilities(part.pictures), known, {"strength": probe.strength})


def knn(train: Part, validation: Part, known: ClassificationSet, seed: int) -> Fitted:
    """Votes of the 20 nearest neighbours; nothing is fitted."""

    def votes(part: Part) -> Float[Tensor, "N K"]:
        return knn_probabilities(train.pictures, train.labels, part.pictures, num_classes=known.num_classes)

    return _classifier(votes, known, {})


def bags(pooling: str) -> Fit:
    """A probe of the slices of a volume, pooled so."""

    def fit(train: Part, validation: Part, known: ClassificationSet, seed: int) -> Fitted:
        probe = fit_bag_probe(
            train.features,
            train.labels,
            validation.features,
            validation.labels,
            pooling=pooling,
            kind=known.kind,
            num_classes=known.num_classes,
            seed=seed,
        )
        return _classifier(lambda part: probe.probabilities(part.features), known, {"strength": probe.linear.strength})

    return fit


def retrieval(train: Part, validation: Part, known: ClassificationSet, seed: int) -> Fitted:
    """Are the nearest training images (volumes: means of their slices) of the same class, or share a label?"""

    def found(part: Part) -> dict[str, Float[Tensor, " N"]]:
        return retrieval_scores(part.features.mean(1), part.labels, train.features.mean(1), train.labels)

    def answers(part: Part) -> dict[str, Any]:
        columns = {name: values.tolist() for name, values in found(part).items()}
        return {"scores": {name: [None if v != v else round(v, 7) for v in rows] for name, rows in columns.items()}}

    return Fitted(answers, lambda part: float(found(part)["map@10"].nanmean()), {})


def _classifier(
    compute: Callable[[Part], Float[Tensor, "N K"]],
    known: ClassificationSet,
    settings: Mapping[str, float | int | str | None],
) -> Fitted:
    """A probe that gives probabilities."""

    def answers(part: Part) -> dict[str, Any]:
        rows = [[round(p, 7) for p in row] for row in compute(part).tolist()]
        return {
            "kind": known.kind,
            "labels": part.labels.reshape(len(rows), -1).tolist(),
            "probabilities": rows,
        }

    def quality(part: Part) -> float:
        return classification_scores(part.labels.numpy(), compute(part).numpy(), [CHOSEN_BY])[CHOSEN_BY]

    return Fitted(answers, quality, settings)


@dataclass(frozen=True, eq=False)
class ClassificationData:
    """A labelled set as a task uses it. features_folder: where features are kept, for all tasks."""

    entry: TaskEntry
    known: ClassificationSet
    features_folder: Path
    device: torch.device

    @classmethod
    def open(cls, entry: TaskEntry, root: Path, folder: Path, device: torch.device) -> "ClassificationData":
        """Errors: those of the set; UsageError where groups are to be held out and there are none."""
        known = open_classification_set(root / entry.data)
        labelled = {side: tuple(case for case in cases if case.labels) for side, cases in known.splits.items()}
        known = replace(known, splits=labelled)
        if entry.hold_out == "group" and not known.has_groups:
            fix = "add the column 'group', or take hold_out split."
            raise UsageError("no groups are named, so none can be held out.", where=known.path, fix=fix)
        if entry.limit is not None:
            parts = {
                side: tuple(cases[place] for place in spread(len(cases), entry.limit))
                for side, cases in known.splits.items()
            }
            known = replace(known, splits=parts)
        return cls(entry, known, folder / "features", device)

    @property
    def sites(self) -> tuple[str | None, ...]:
        if self.entry.hold_out == "split":
            return (None,)
        return tuple(sorted({case.group for cases in self.known.splits.values() for case in cases if case.group}))

    @cached_property
    def digests(self) -> dict[Path, str]:
        """SHA-256 of every image file."""
        return {file: source_digest(file) for file in sorted({case.file for case in self._all()})}

    @cached_property
    def digest(self) -> str:
        """Of the table, and of which image belongs to which case, wherever they lie."""
        return digest_json([self.known.digest, [[case.id, self.digests[case.file]] for case in self._all()]])

    def split(self, site: str | None) -> dict[SplitName, tuple[LabelledCase, ...]]:
        """Training, validation and test cases; with a site, all of its cases are the test.

        Where none are left to train on or to choose with, a fifth of the others chooses. Errors: UsageError where
        there are not two others.
        """
        if site is None:
            return self.known.splits
        rest = {side: tuple(c for c in cases if c.group != site) for side, cases in self.known.splits.items()}
        test = tuple(case for case in self._all() if case.group == site)
        train, val = rest["train"] + rest["test"], rest["val"]
        if not (train and val):
            train, val = _drawn_anew((*train, *val), self.known.path)
        return {"train": train, "val": val, "test": test}

    def ids(self, site: str | None) -> list[list[str]]:
        """Of the cases that train, that choose, and that test."""
        split = self.split(site)
        return [[case.id for case in split[side]] for side in ("train", "val", "test")]

    def features(self, encoder: Encoder, cell: Cell) -> ImageFeatures:
        fault = None if cell.corruption is None else (cell.corruption, cell.strength)
        view = View(self.known.ndim, self.entry.axes, self.entry.slices, self.entry.window, fault)
        return ImageFeatures(
            self.features_folder, encoder, cell.resolution, self.device, content=self.digest, view=view
        )

    def num_missing(self, encoder: Encoder, cell: Cell) -> int:
        """Images that the encoder still has to see for a cell; corrupted ones are those of the test alone."""
        features, split = self.features(encoder, cell), self.split(cell.site)
        sides = [split["test"]] if cell.corruption else split.values()
        return sum(features.num_missing(cases) for cases in sides)

    def fit(self, cell: Cell, encoder: Encoder, fit: Fit) -> Fitted:
        """Fit on the training cases (or `cell.shots` of each class), choose on validation."""
        split, features = self.split(cell.site), self.features(encoder, cell.clean)
        train, whole = (Part(features(split[side]), self._labels(split[side])) for side in ("train", "val"))
        validation = whole
        if cell.shots is not None:
            train, validation = (_few(part, cell.shots, cell.seed) for part in (train, whole))
        fitted = fit(train, validation, self.known, cell.seed)
        chosen = float("nan") if cell.shots is not None else float(fitted.quality(whole))
        return replace(fitted, num_train=len(train.labels), validation=None if np.isnan(chosen) else chosen)

    def measure(self, cell: Cell, encoder: Encoder, fitted: Fitted) -> CellResult:
        """Score the test cases."""
        test, features = self.split(cell.site)["test"], self.features(encoder, cell)
        named = {case.id: case.group for case in test if case.group}
        seen = encoder.card.pretraining
        return CellResult(
            cell=cell,
            cases=tuple(case.id for case in test),
            groups=owners_of([case.id for case in test], named) if self.known.has_groups else None,
            **fitted.answers(Part(features(test), self._labels(test))),
            validation=fitted.validation,
            num_train=fitted.num_train,
            settings={"side": features.side, **fitted.settings},
            leaked=() if seen is None else tuple(case.id for case in test if seen.holds(self.digests[case.file])),
        )

    def _all(self) -> Sequence[LabelledCase]:
        return [case for cases in self.known.splits.values() for case in cases]

    def _labels(self, cases: Sequence[LabelledCase]) -> Tensor:
        rows = torch.tensor([case.labels for case in cases])
        return rows if self.known.kind == "multi" else rows[:, 0]


def _drawn_anew(
    cases: Sequence[LabelledCase], where: Path
) -> tuple[tuple[LabelledCase, ...], tuple[LabelledCase, ...]]:
    """Cases to train on, and a fifth (of very few: one part of them) to choose with; sites whole if there are two."""
    if len(cases) < 2:
        fact = "a site holds all cases but one: none are left to train on and to choose with."
        raise UsageError(fact, where=where, fix="take hold_out split.")
    groups: dict[str, list[str]] = {}
    named = len({case.group for case in cases if case.group}) > 1
    for case in cases:
        groups.setdefault(f"group {case.group}" if named and case.group else f"case {case.id}", []).append(case.id)
    chosen = set(deal(groups, min(NUM_PARTS, len(groups)), seed=0)[-1])
    return tuple(case for case in cases if case.id not in chosen), tuple(case for case in cases if case.id in chosen)


def _few(part: Part, number: int, seed: int) -> Part:
    """`number` cases of each class (of several labels: with each label), more of the same seed holding the fewer."""
    order = np.random.default_rng([seed, 11]).permutation(len(part.labels))
    labels = part.labels.numpy()[order]
    columns = labels.T == 1 if labels.ndim == 2 else np.arange(labels.max() + 1)[:, None] == labels
    chosen = sorted({int(place) for column in columns for place in order[np.flatnonzero(column)[:number]]})
    return Part(part.features[chosen], part.labels[chosen])
