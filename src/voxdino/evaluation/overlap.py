"""How much two masks overlap, and their volumes."""

import numpy as np
from jaxtyping import Bool


def dice(prediction: Bool[np.ndarray, "*spatial"], reference: Bool[np.ndarray, "*spatial"]) -> float:
    """Dice coefficient 2|A∩B| / (|A|+|B|), in [0, 1].

    NaN when both masks are empty (nothing to find, nothing claimed); 0.0 when only one is.
    """
    size = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2.0 * np.count_nonzero(prediction & reference) / size if size else float("nan")


def iou(prediction: Bool[np.ndarray, "*spatial"], reference: Bool[np.ndarray, "*spatial"]) -> float:
    """Intersection over union |A∩B| / |A∪B| (Jaccard index), in [0, 1].

    NaN when both masks are empty; 0.0 when only one is.
    """
    union = np.count_nonzero(prediction | reference)
    return np.count_nonzero(prediction & reference) / union if union else float("nan")
