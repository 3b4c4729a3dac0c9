"""What is kept of a cell: scores case by case, so that every table, interval and test can be made again from it."""

from pydantic import Field

from voxdino.benchmark.grid import Cell
from voxdino.core.labels import LabelKind
from voxdino.core.records import Record


class CellResult(Record):
    """One measured cell.

    cases, groups:  the test cases in order, and their patients or sites where they are known.
    kind:           of a classification task: of its labels; None in files of earlier versions.
    labels, probabilities: of a classification task, a row per case: its class, or 0 and 1 per label; (K,) shares.
    scores:         of a segmentation task: metric -> a value per case, the mean of its structures; None: undefined.
    validation:     the task's `chosen_by` on cases that neither train nor test; the resolution is chosen by it.
    settings:       what the probe chose.   failed: test cases without a score, with the reason.
    leaked:         test cases that the encoder's pretraining has seen.
    elapsed_s:      of this machine; no part of any table.
    """

    cell: Cell
    cases: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    kind: LabelKind | None = None
    labels: tuple[tuple[int, ...], ...] = ()
    probabilities: tuple[tuple[float, ...], ...] = ()
    scores: dict[str, tuple[float | None, ...]] = Field(default={})
    validation: float | None
    num_train: int
    settings: dict[str, float | int | str | None] = Field(default={})
    failed: dict[str, str] = Field(default={})
    leaked: tuple[str, ...] = ()
    elapsed_s: float = 0.0

    @property
    def is_multi(self) -> bool:
        """Whether a case may have any number of labels. Files without `kind`: one class has more than one share."""
        return self.kind == "multi" or (self.kind is None and len(self.labels[0]) == len(self.probabilities[0]))
