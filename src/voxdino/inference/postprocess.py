"""What is cleaned up after a prediction, class by class, and how that is chosen: by what helps held-back cases."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import cc3d
import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from pydantic import Field

from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.volume import LabelMap
from voxdino.preparation.fingerprint import bounding_box

FILE_NAME = "postprocessing.json"  # beside model.json
SHARES = (0.25, 0.5, 1.0)  # of the smallest reference component: volumes below which components may go
_CLOSE = 1e-9  # gains below it are rounding

Mask = Bool[np.ndarray, "*spatial"]
Pairs = Callable[[], Iterable[tuple[LabelMap, LabelMap]]]


class Rule(Record):
    """What is done to the voxels of one class, in this order.

    min_volume: components (26 neighbours) smaller than this become background; mm³, in 2-D mm² or pixels.
    largest:    only the largest component stays.
    fill_holes: background that the class encloses on all sides becomes the class.
    """

    min_volume: float = Field(default=0.0, ge=0)
    largest: bool = False
    fill_holes: bool = False


class Evidence(Record):
    """Mean Dice of a class over the held-back cases, before and after its rule; both empty counts as 1."""

    num_cases: int
    before: float
    after: float


class Postprocessing(Record):
    """postprocessing.json: name of a class -> its rule, and why; classes without a rule stay as predicted."""

    rules: dict[str, Rule] = Field(default_factory=dict)
    evidence: dict[str, Evidence] = Field(default_factory=dict)

    @classmethod
    def of_run(cls, run_folder: Path) -> "Postprocessing":
        """What was chosen for the model of a run; nothing where nobody did."""
        path = run_folder / FILE_NAME
        return cls.read(path) if path.is_file() else cls()

    def apply(self, labels: LabelMap, label_set: LabelSet) -> LabelMap:
        """The label map cleaned up; the given one stays as it is. Classes take their turn in the set's order."""
        if not self.rules:
            return labels
        array, background = labels.array.copy(), label_set.ids[0]
        for name, value in label_set.foreground:
            if (rule := self.rules.get(name)) is None:
                continue
            if not (array == value).any():
                continue
            part = array[bounding_box(array == value)]
            mask = part == value
            kept = _cleaned(mask, rule, labels.grid.voxel_volume)
            part[mask & ~kept] = background
            part[kept & (part == background)] = value
        return LabelMap(array, labels.grid, labels.notes, labels.source)


def choose_postprocessing(pairs: Pairs, label_set: LabelSet) -> Postprocessing:
    """For every class the rule that raises its mean Dice over (prediction, reference) pairs most, if any does.

    One step at a time (small components, all but the largest, holes), each kept only where the mean rises and no more
    cases lose than win. pairs: called once per class, so that one pair is in memory at a time.
    """
    rules, evidence = {}, {}
    for name, value in label_set.foreground:
        masks = [_masks(prediction, reference, value) for prediction, reference in pairs()]
        before = _scores(masks, Rule())
        rule, best = Rule(), before
        for change in _candidates(masks):
            candidate = rule.model_copy(update=change)
            scores = _scores(masks, candidate)
            gains = [new - old for new, old in zip(scores, best, strict=True)]
            wins, losses = (sum(sign * gain > _CLOSE for gain in gains) for sign in (1, -1))
            if sum(gains) > _CLOSE and wins >= losses:
                rule, best = candidate, scores
        if rule != Rule():
            rules[name] = rule
            evidence[name] = Evidence(num_cases=len(masks), before=round(_mean(before), 4), after=round(_mean(best), 4))
    return Postprocessing(rules=rules, evidence=evidence)


def mean_dice(pairs: Iterable[tuple[LabelMap, LabelMap]], label_set: LabelSet) -> float:
    """Mean Dice over classes and (prediction, reference) pairs; both empty counts as 1."""
    values = [value for _, value in label_set.foreground]
    scores = [_scores([_masks(*pair, value)], Rule())[0] for pair in pairs for value in values]
    return _mean(scores)


Masks = tuple[NDArray[np.bool_], NDArray[np.bool_], float]  # predicted, reference, in their box; volume of a voxel


def _masks(prediction: LabelMap, reference: LabelMap, value: int) -> Masks:
    found, truth = prediction.array == value, reference.array == value
    either = found | truth
    box = bounding_box(either) if either.any() else (slice(0, 0),) * found.ndim
    return found[box], truth[box], prediction.grid.voxel_volume


def _candidates(masks: Sequence[Masks]) -> Iterator[dict[str, Any]]:
    volumes = [
        float(sizes.min()) * voxel for _, truth, voxel in masks if len(sizes := _component_sizes(_components(truth)))
    ]
    if volumes:
        yield from ({"min_volume": round(share * min(volumes), 4)} for share in SHARES)
    yield {"largest": True}
    yield {"fill_holes": True}


def _scores(masks: Sequence[Masks], rule: Rule) -> list[float]:
    scores = []
    for found, truth, voxel in masks:
        cleaned = _cleaned(found, rule, voxel)
        size = int(cleaned.sum()) + int(truth.sum())
        scores.append(2 * int((cleaned & truth).sum()) / size if size else 1.0)
    return scores


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 1.0


def _cleaned(mask: Mask, rule: Rule, voxel_volume: float) -> Mask:
    if (rule.min_volume > 0 or rule.largest) and mask.any():
        components = _components(mask)
        sizes = _component_sizes(components)
        keep = sizes * voxel_volume >= rule.min_volume - _CLOSE
        if rule.largest and keep.any():
            keep &= np.arange(len(sizes)) == int(np.argmax(sizes))
        mask = np.concatenate(([False], keep))[components]
    return _filled(mask) if rule.fill_holes else mask


def _filled(mask: Mask) -> Mask:
    """With the background that does not reach the edge of the box (6 neighbours; 4 in 2-D)."""
    outside = _components(np.pad(~mask, 1, constant_values=True), connectivity=6 if mask.ndim == 3 else 4)
    inner = tuple(slice(1, -1) for _ in range(mask.ndim))
    filled: Mask = outside[inner] != outside[(0,) * mask.ndim]
    return filled


def _components(mask: Mask, *, connectivity: Literal[4, 6, 8, 26] | None = None) -> NDArray[Any]:
    chosen = connectivity or (26 if mask.ndim == 3 else 8)
    components: NDArray[Any] = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=chosen)
    return components


def _component_sizes(components: NDArray[Any]) -> NDArray[np.int64]:
    return np.bincount(components.reshape(-1))[1:] if components.size else np.zeros(0, np.int64)
