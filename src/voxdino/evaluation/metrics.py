"""METRICS: every score voxdino computes, its unit, its definition and its rule for empty masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from voxdino.evaluation import overlap
from voxdino.evaluation.masks import MaskPair


@dataclass(frozen=True)
class Metric:
    """One score of a pair of masks. Its rule for empty masks is the docstring of `compute`.

    unit:       "" (a share), "length" (mm or pixels) or "volume" (ml; in 2-D mm² or pixels).
    better:     which direction is the better one; None for plain facts.
    definition: what exactly is computed, printed beside every number.
    by_lesion:  counts connected components: computed only where asked for, since organs are not lesions.
    """

    compute: Callable[[MaskPair], float]
    unit: Literal["", "length", "volume"]
    better: Literal["higher", "lower"] | None
    definition: str
    by_lesion: bool = False


def dice(pair: MaskPair) -> float:
    """Dice coefficient. Both masks empty: NaN (undefined). One empty: 0."""
    return overlap.dice(pair.prediction, pair.reference)


def iou(pair: MaskPair) -> float:
    """Intersection over union. Both masks empty: NaN (undefined). One empty: 0."""
    return overlap.iou(pair.prediction, pair.reference)


def hd95(pair: MaskPair) -> float:
    """95 % Hausdorff distance: the larger of the 95 % area-weighted percentiles of both directions.

    Any mask empty: NaN (undefined); where only one is, the case is also counted as missed or as a false alarm.
    """
    if pair.surfaces is None:
        return float("nan")
    return max(pair.surfaces.from_prediction.percentile(95.0), pair.surfaces.from_reference.percentile(95.0))


def nsd(pair: MaskPair) -> float:
    """Normalised surface distance: share of both surfaces' area within the tolerance of the other surface.

    Both masks empty: NaN (undefined). One empty: 0.
    """
    if pair.surfaces is None:
        return 0.0 if pair.prediction.any() or pair.reference.any() else float("nan")
    directed = (pair.surfaces.from_prediction, pair.surfaces.from_reference)
    return sum(d.area_within(pair.tolerance) for d in directed) / sum(d.area for d in directed)


def volume(pair: MaskPair) -> float:
    """Volume of the predicted mask. Empty: 0."""
    return int(pair.prediction.sum()) * pair.voxel_volume


def volume_error(pair: MaskPair) -> float:
    """Predicted minus reference volume: positive where too much is marked. Always defined; both empty: 0."""
    return (int(pair.prediction.sum()) - int(pair.reference.sum())) * pair.voxel_volume


def lesion_recall(pair: MaskPair) -> float:
    """Share of the reference's lesions (connected components) that are found. Reference empty: NaN (undefined)."""
    return pair.lesions.recall


def lesion_precision(pair: MaskPair) -> float:
    """Share of the predicted lesions that are in the reference. Prediction empty: NaN (undefined)."""
    return pair.lesions.precision


def lesion_f1(pair: MaskPair) -> float:
    """Harmonic mean of lesion recall and precision. Both masks empty: NaN (undefined). One empty: 0."""
    return pair.lesions.f1


METRICS: dict[str, Metric] = {
    "dice": Metric(dice, "", "higher", "dice"),
    "iou": Metric(iou, "", "higher", "iou"),
    "hd95": Metric(hd95, "length", "lower", "hd95:max-of-directed-area-weighted"),
    "nsd": Metric(nsd, "", "higher", "nsd:area-weighted"),
    "volume": Metric(volume, "volume", None, "volume:predicted"),
    "volume_error": Metric(volume_error, "volume", None, "volume:predicted-minus-reference"),
    "lesion_recall": Metric(lesion_recall, "", "higher", "lesion-recall:overlapping-components", by_lesion=True),
    "lesion_precision": Metric(
        lesion_precision, "", "higher", "lesion-precision:overlapping-components", by_lesion=True
    ),
    "lesion_f1": Metric(lesion_f1, "", "higher", "lesion-f1:overlapping-components", by_lesion=True),
}
LESION_METRICS = tuple(name for name, metric in METRICS.items() if metric.by_lesion)
USUAL_METRICS = tuple(name for name in METRICS if name not in LESION_METRICS)
