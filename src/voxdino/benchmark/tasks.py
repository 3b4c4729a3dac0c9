"""TASKS: what can be asked of frozen features. A new probe is one function and one line here."""

from dataclasses import dataclass
from typing import Literal

from voxdino.benchmark import classification, decoders, matching, segmentation
from voxdino.benchmark.grid import TaskEntry
from voxdino.core.errors import UsageError
from voxdino.models.registry import look_up


@dataclass(frozen=True)
class ClassificationTask:
    """A probe of whole pictures (ndim 2), volumes (3) or both (None).

    metric:    what methods are compared by.   chosen_by: what the resolution is chosen by, of the validation cases.
    is_seeded: it depends on a seed.   kind: whose table of all numbers it stands in.
    """

    fit: classification.Fit
    what: str
    ndim: Literal[2, 3] | None = None
    is_seeded: bool = False
    metric: str = "auroc"
    chosen_by: str = classification.CHOSEN_BY
    metrics: tuple[str, ...] = ("auroc", "accuracy", "balanced_accuracy", "f1")
    kind: str = "classification"


@dataclass(frozen=True)
class SegmentationTask:
    """A probe of patch tokens; see ClassificationTask.

    cost: of what making it ready is made (`estimate`).   takes_shots: it can be asked of few training cases.
    """

    fit: segmentation.Fit
    what: str
    ndim: Literal[3] | None = None
    cost: Literal["fit", "steps", "none"] = "fit"
    takes_shots: bool = True
    is_seeded: bool = False
    metric: str = "dice"
    chosen_by: str = "dice"
    metrics: tuple[str, ...] = segmentation.METRICS
    kind: str = "segmentation"


Task = ClassificationTask | SegmentationTask


def _bags(pooling: str, what: str, *, is_seeded: bool = False) -> ClassificationTask:
    return ClassificationTask(classification.bags(pooling), what, ndim=3, is_seeded=is_seeded)


def _decoder(recipe: str, what: str, ndim: Literal[3] | None = None) -> SegmentationTask:
    return SegmentationTask(decoders.decoder(recipe), what, ndim=ndim, cost="steps", is_seeded=True)


TASKS: dict[str, Task] = {
    "linear": ClassificationTask(classification.linear, "logistic regression", ndim=2),
    "knn": ClassificationTask(classification.knn, "20 nearest neighbours", ndim=2),
    "slice_mean": _bags("mean", "logistic regression of the mean of slices"),
    "slice_max": _bags("max", "logistic regression of the maximum of slices"),
    "slice_attention": _bags("attention", "attentive pooling of slices", is_seeded=True),
    "abmil": _bags("abmil", "gated attention over slices", is_seeded=True),
    "retrieval": ClassificationTask(
        classification.retrieval,
        "nearest training images",
        metric="map@10",
        chosen_by="map@10",
        metrics=("map@10", "recall@1", "recall@5", "recall@10"),
        kind="retrieval",
    ),
    "patch_linear": SegmentationTask(decoders.patch_linear, "linear layer on patch tokens"),
    "decoder_2d": _decoder("segdino_v1", "light 2-D decoder"),
    "decoder_3d": _decoder("frozen_conv3d", "stacked 3-D decoder", ndim=3),
    "correspondence": SegmentationTask(
        matching.one_case, "masks of one case, carried over", cost="none", takes_shots=False, is_seeded=True
    ),
}


def task_of(entry: TaskEntry) -> Task:
    """What a task of a grid asks. Errors: UsageError for an unknown probe, and for shots of one that takes none."""
    task = look_up(TASKS, entry.probe, kind="probe")
    if entry.shots and isinstance(task, SegmentationTask) and not task.takes_shots:
        fix = "take shots out of this task; seeds draw other cases."
        raise UsageError(f"{entry.probe} asks one labelled case, not several.", where=entry.name, fix=fix)
    return task
