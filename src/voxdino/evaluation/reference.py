"""The reference case of the metrics, in the same form as those of the models (voxdino.models.reference)."""

from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

import torch
from torch import Tensor

from voxdino.evaluation.masks import MaskPair, pair_masks
from voxdino.evaluation.metrics import METRICS
from voxdino.models.reference import Case

# our metric -> the tool's number that it must equal; at a tolerance of 1 mm
SAME_DEFINITION = {
    "dice": "dice",
    "hd95": "surface_distance.hd95_mm",
    "hd": "surface_distance.hd100_mm",
    "nsd": "surface_distance.nsd_1mm",
    "meddinov3:hd95": "monai.hd95_mm",
    "meddinov3:nsd": "monai.nsd_1mm",
    "nnunet:dice": "dice",
    "dinomed3d:hd95": "medpy.hd95_voxels",
    "segdino:hd95": "segdino.hd95_pixels",
}


def _metrics(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Relative differences, so that one tolerance holds for millimetres and shares; undefined equals undefined."""
    for name, told in facts["cases"].items():
        prediction, reference = (tensors[f"{name}.{which}"].bool().numpy() for which in ("prediction", "reference"))
        pair = pair_masks(prediction, reference, tuple(told["spacing_mm"]))
        for metric, key in SAME_DEFINITION.items():
            is_left_out = (
                METRICS[metric].paper == "meddinov3" and not pair.reference.any()
            )  # by their script, not MONAI
            if key in told and not is_left_out:
                yield _relative(METRICS[metric].compute(pair), float(told[key]))
        if "surface_distance.average_mm" in told:
            yield from map(_relative, _directed_means(pair), told["surface_distance.average_mm"])


def _directed_means(pair: MaskPair) -> tuple[float, float]:
    """From the reference and from the prediction."""
    assert pair.surfaces is not None, "the stored cases with averages have two masks"
    return pair.surfaces.from_reference.mean, pair.surfaces.from_prediction.mean


def _relative(ours: float, theirs: float) -> tuple[Tensor, Tensor]:
    if isnan(theirs):
        return torch.tensor(0.0 if isnan(ours) else 1.0), torch.tensor(0.0)
    scale = abs(theirs) or 1.0
    return torch.tensor(ours / scale, dtype=torch.float64), torch.tensor(theirs / scale, dtype=torch.float64)


CASES: dict[str, Case] = {
    "metrics": _metrics,
}
