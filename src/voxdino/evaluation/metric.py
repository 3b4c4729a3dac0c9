"""What a metric is: a number of two masks with its unit, its definition, and what it says about empty masks."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import getdoc
from math import isnan
from typing import Literal

from voxdino.evaluation.masks import MaskPair

EmptyRule = Literal["undefined", "score"]
Unit = Literal["", "length", "volume", "voxels"]
SCORED = (
    "Empty masks are scored: both empty is the best value, one empty the worst (of distances the image's diagonal)."
)


@dataclass(frozen=True)
class Metric:
    """One score of a pair of masks. Its rule for empty masks is the docstring of `compute`.

    unit:       "" (a share), "length" (mm or pixels), "voxels", or "volume" (ml; in 2-D mm² or pixels).
    better:     which direction is the better one; None for plain facts.
    definition: what exactly is computed, printed beside every number.
    by_lesion:  counts connected components: computed only where asked for, since organs are not lesions.
    paper:      whose printed column this is; its rule for empty masks is that paper's, whatever else is asked for.
    resized_to: both label maps are brought to so many pixels along each axis first; None: their own grid.
    """

    compute: Callable[[MaskPair], float]
    unit: Unit
    better: Literal["higher", "lower"] | None
    definition: str
    by_lesion: bool = False
    paper: str | None = None
    resized_to: int | None = None

    def value(self, pair: MaskPair, empty: EmptyRule = "undefined") -> float:
        """The number; NaN where it is undefined, which under the rule "score" no metric with a better side is."""
        value = self.compute(pair)
        if not (isnan(value) and self._scores_empty(empty)):
            return value
        is_best = not (pair.prediction.any() or pair.reference.any())
        if self.better == "higher":
            return 1.0 if is_best else 0.0
        return 0.0 if is_best else pair.diagonal

    def definition_under(self, empty: EmptyRule) -> str:
        """The definition's id, which tells when empty masks are scored."""
        return f"{self.definition}:empty-scored" if self._scores_empty(empty) else self.definition

    def rule_under(self, empty: EmptyRule) -> str:
        """In words: what is computed, and what of empty masks."""
        told = getdoc(self.compute) or ""
        return f"{told.splitlines()[0]} {SCORED}" if self._scores_empty(empty) else told

    def _scores_empty(self, empty: EmptyRule) -> bool:
        return empty == "score" and self.better is not None and self.paper is None
