"""One prediction against its reference, structure by structure: from two arrays of class indices to rows of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, prod

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import UsageError
from voxdino.core.geometry import Grid
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.evaluation.lesions import lesion_scores
from voxdino.evaluation.masks import Box, MapPair, MaskPair, pair_maps
from voxdino.evaluation.metric import EmptyRule, Metric
from voxdino.evaluation.metrics import METRICS, USUAL_METRICS
from voxdino.evaluation.scores import Outcome, StructureScores


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured of every structure.

    metrics:     names of METRICS.
    tolerance:   of NSD, in mm (pixels where a file states no spacing).
    min_overlap: share of a lesion that must be marked for it to count as found; 0: one voxel is enough.
    empty:       "undefined": every metric's own rule; "score": the best value where both masks are empty, the worst
                 where one is.
    Errors: UsageError for an unknown metric.
    """

    metrics: tuple[str, ...] = USUAL_METRICS
    tolerance: float = 1.0
    min_overlap: float = 0.0
    empty: EmptyRule = "undefined"

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                known = f"known: {', '.join(METRICS)}."
                raise UsageError(f"unknown metric '{name}'.{nearest(name, METRICS)}", fix=known)

    @property
    def table(self) -> dict[str, Metric]:
        return {name: METRICS[name] for name in self.metrics}


def score_label_maps(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    grid: Grid,
    labels: LabelSet,
    *,
    case: str = "",
    measures: Measures | None = None,
) -> tuple[StructureScores, ...]:
    """Score class indices (*spatial) of a prediction against those of its reference, one row per structure.

    Every structure is measured in the box that holds it in both maps; all boxes are found in one pass. Voxels with the
    ignore index in the reference count as background in both. Memory: about 20 bytes per voxel of the largest box, and
    a copy of both maps where there is an ignore label.

    Errors: GeometryError for different shapes, or for a column that needs a picture.
    """
    measures = measures or Measures()
    if labels.ignore_id is not None:
        ignored = reference == labels.ignore_index
        prediction, reference = np.where(ignored, 0, prediction), np.where(ignored, 0, reference)
    maps = pair_maps(prediction, reference, grid.spacing)
    members = [indices for _, indices in structures(labels)]
    table = measures.table
    versions = {size: _boxed(maps, size, members) for size in {None, *(metric.resized_to for metric in table.values())}}
    by_lesion = any(metric.by_lesion for metric in table.values())
    options = {"tolerance": measures.tolerance, "min_overlap": measures.min_overlap}
    rows = []
    for place, (name, indices) in enumerate(structures(labels)):
        pairs = {size: of.masks(indices, boxes[place], **options) for size, (of, boxes) in versions.items()}
        values = {key: metric.value(pairs[metric.resized_to], measures.empty) for key, metric in table.items()}
        rows.append(
            StructureScores(
                case=case,
                structure=name,
                outcome=_outcome(pairs[None]),
                values={key: None if isnan(value) else value for key, value in values.items()},
                lesions=lesion_scores(pairs[None].lesions, prod(grid.spacing)) if by_lesion else None,
            )
        )
    return tuple(rows)


def structures(labels: LabelSet) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, class indices) of everything that is scored: the regions where there are any, else the classes."""
    if labels.regions:
        names = (region.name for region in labels.regions)
        return tuple(zip(names, labels.region_members(), strict=True))
    return tuple((name, (index,)) for index, (name, _) in enumerate(labels.foreground, start=1))


def _boxed(maps: MapPair, size: int | None, members: Sequence[tuple[int, ...]]) -> tuple[MapPair, list[Box]]:
    """The maps at a size, and the structures' boxes there."""
    maps = maps if size is None else maps.resized(size)
    return maps, maps.boxes(members)


def _outcome(pair: MaskPair) -> Outcome:
    claimed, there = bool(pair.prediction.any()), bool(pair.reference.any())
    if there:
        return "both" if claimed else "missed"
    return "false alarm" if claimed else "absent"
