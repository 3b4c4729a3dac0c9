"""What the numbers of the benchmark are called, how they are defined, and which way is better."""

from dataclasses import dataclass
from typing import Literal

from voxdino.evaluation.classification import CLASSIFICATION_METRICS
from voxdino.evaluation.metrics import METRICS

NAMES = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95": "HD95",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "brier": "Brier score",
    "map@10": "mAP at 10",
}


@dataclass(frozen=True)
class Measure:
    """One kind of number. name: for a reader."""

    name: str
    definition: str
    better: Literal["higher", "lower"] | None


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " ").replace("@", " at "))


MEASURES = {
    **{name: Measure(_name(name), one.definition, one.better) for name, one in CLASSIFICATION_METRICS.items()},
    **{name: Measure(_name(name), one.definition, one.better) for name, one in METRICS.items()},
    **{f"recall@{k}": Measure(_name(f"recall@{k}"), f"recall:match-of-{k}-nearest", "higher") for k in (1, 5, 10)},
    "map@10": Measure(_name("map@10"), "average-precision:10-nearest-of-what-10-could-be", "higher"),
}
