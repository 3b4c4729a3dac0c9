"""The columns that four published works print, each computed as its authors' own script computes it.

They answer one question: is my number the one of their table? For everything else there are voxdino's own metrics:
these here depend on the grid a mask is stored on, disagree with each other on the same pair of masks, and treat empty
masks in ways that flatter. The rules are those found in the authors' evaluation scripts; where a script is silent, the
docstring says what stands here.

- meddinov3: per case and class with MONAI 1.6.1, in mm on the original grid, tolerance as asked for (theirs: 1 mm).
- nnunet:    Dice and IoU per case and class.
- dinomed3d: medpy 0.5.2, with a spacing of 1 along every axis.
- segdino:   on 256 x 256 pixels, the size of its network input, distances in those pixels; pictures only.

Their mean over classes is the mean of the classes' means over the cases.
"""

import numpy as np

from voxdino.evaluation import overlap
from voxdino.evaluation.edges import EdgeDistances
from voxdino.evaluation.masks import MaskPair
from voxdino.evaluation.metric import Metric

NAN = float("nan")
SEGDINO_SIZE = 256


def meddinov3_dice(pair: MaskPair) -> float:
    """Dice coefficient. Reference empty: NaN, so that a false alarm costs nothing. Prediction empty: 0."""
    return overlap.dice(pair.prediction, pair.reference) if pair.reference.any() else NAN


def meddinov3_hd95(pair: MaskPair) -> float:
    """The larger of both directions' 95 % percentiles over edge voxels (MONAI). Any mask empty: NaN; a miss is free."""
    if pair.edges is None:
        return NAN
    return float(max(np.percentile(side, 95) for side in (pair.edges.from_prediction, pair.edges.from_reference)))


def meddinov3_nsd(pair: MaskPair) -> float:
    """Share of both masks' edge voxels within the tolerance (MONAI). Reference empty: NaN. Prediction empty: 0."""
    if pair.edges is None:
        return 0.0 if pair.reference.any() else NAN
    return float((pair.edges.pooled <= pair.tolerance * (1 + 1e-6)).mean())


def nnunet_dice(pair: MaskPair) -> float:
    """Dice coefficient. Both masks empty: NaN. One empty: 0."""
    return overlap.dice(pair.prediction, pair.reference)


def nnunet_iou(pair: MaskPair) -> float:
    """Intersection over union. Both masks empty: NaN. One empty: 0."""
    return overlap.iou(pair.prediction, pair.reference)


def dinomed3d_dice(pair: MaskPair) -> float:
    """Dice coefficient. Both masks empty: 1, which flatters. One empty: 0."""
    return overlap.dice(pair.prediction, pair.reference) if _is_any(pair) else 1.0


def dinomed3d_hd95(pair: MaskPair) -> float:
    """95 % percentile of all edge voxels' distances, in voxels (medpy). Both masks empty: 0. One empty: NaN."""
    return _pooled_hd95(pair.edges_in_voxels) if _is_any(pair) else 0.0


def segdino_dice(pair: MaskPair) -> float:
    """Dice coefficient. Both masks empty: NaN here (their script: not known). One empty: 0."""
    return overlap.dice(pair.prediction, pair.reference)


def segdino_iou(pair: MaskPair) -> float:
    """Intersection over union. Both masks empty: NaN here (their script: not known). One empty: 0."""
    return overlap.iou(pair.prediction, pair.reference)


def segdino_hd95(pair: MaskPair) -> float:
    """95 % percentile of all edge pixels' distances. Both masks empty: 0. One empty: NaN (theirs: dropped)."""
    return _pooled_hd95(pair.edges_in_voxels) if _is_any(pair) else 0.0


def _pooled_hd95(edges: EdgeDistances | None) -> float:
    return NAN if edges is None else float(np.percentile(edges.pooled, 95))


def _is_any(pair: MaskPair) -> bool:
    return bool(pair.prediction.any() or pair.reference.any())


PAPERS: dict[str, dict[str, Metric]] = {
    "meddinov3": {
        "dice": Metric(meddinov3_dice, "", "higher", "dice:where-in-reference", paper="meddinov3"),
        "hd95": Metric(meddinov3_hd95, "length", "lower", "hd95:monai-1.6.1", paper="meddinov3"),
        "nsd": Metric(meddinov3_nsd, "", "higher", "nsd:monai-1.6.1", paper="meddinov3"),
    },
    "nnunet": {
        "dice": Metric(nnunet_dice, "", "higher", "dice", paper="nnunet"),
        "iou": Metric(nnunet_iou, "", "higher", "iou", paper="nnunet"),
    },
    "dinomed3d": {
        "dice": Metric(dinomed3d_dice, "", "higher", "dice:both-empty-1", paper="dinomed3d"),
        "hd95": Metric(dinomed3d_hd95, "voxels", "lower", "hd95:medpy-0.5.2-in-voxels", paper="dinomed3d"),
    },
    "segdino": {
        "dice": Metric(segdino_dice, "", "higher", "dice:256x256", paper="segdino", resized_to=SEGDINO_SIZE),
        "iou": Metric(segdino_iou, "", "higher", "iou:256x256", paper="segdino", resized_to=SEGDINO_SIZE),
        "hd95": Metric(
            segdino_hd95, "voxels", "lower", "hd95:pooled-edge-pixels-256x256", paper="segdino", resized_to=SEGDINO_SIZE
        ),
    },
}
COLUMNS = {f"{paper}:{name}": metric for paper, metrics in PAPERS.items() for name, metric in metrics.items()}
