"""METRICS: every score voxdino computes, its unit, its definition and its rule for empty masks."""

from voxdino.evaluation import overlap
from voxdino.evaluation.masks import MaskPair
from voxdino.evaluation.metric import Metric
from voxdino.evaluation.papers import COLUMNS


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


def hd(pair: MaskPair) -> float:
    """Hausdorff distance: the largest distance from one surface to the other.

    Any mask empty: NaN (undefined); where only one is, the case is also counted as missed or as a false alarm.
    """
    if pair.surfaces is None:
        return float("nan")
    return float(max(pair.surfaces.from_prediction.distances[-1], pair.surfaces.from_reference.distances[-1]))


def assd(pair: MaskPair) -> float:
    """Average symmetric surface distance: the mean over the area of both surfaces together.

    Any mask empty: NaN (undefined); where only one is, the case is also counted as missed or as a false alarm.
    """
    if pair.surfaces is None:
        return float("nan")
    directed = (pair.surfaces.from_prediction, pair.surfaces.from_reference)
    return sum(d.mean * d.area for d in directed) / sum(d.area for d in directed)


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
    "hd": Metric(hd, "length", "lower", "hd:surface-elements"),
    "assd": Metric(assd, "length", "lower", "assd:area-weighted-over-both"),
    "nsd": Metric(nsd, "", "higher", "nsd:area-weighted"),
    "volume": Metric(volume, "volume", None, "volume:predicted"),
    "volume_error": Metric(volume_error, "volume", None, "volume:predicted-minus-reference"),
    "lesion_recall": Metric(lesion_recall, "", "higher", "lesion-recall:overlapping-components", by_lesion=True),
    "lesion_precision": Metric(
        lesion_precision, "", "higher", "lesion-precision:overlapping-components", by_lesion=True
    ),
    "lesion_f1": Metric(lesion_f1, "", "higher", "lesion-f1:overlapping-components", by_lesion=True),
    **COLUMNS,
}
LESION_METRICS = tuple(name for name, metric in METRICS.items() if metric.by_lesion)
USUAL_METRICS = tuple(name for name, metric in METRICS.items() if not metric.by_lesion and metric.paper is None)
