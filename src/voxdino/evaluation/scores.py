"""scores.json: what was measured, case by case and over the cases, with the definition beside every number."""

from typing import Literal

from pydantic import Field

from voxdino.core.records import Record

Outcome = Literal["both", "missed", "false alarm", "absent"]


class Share(Record):
    """A share over all cases together. low, high: 95 % bootstrap interval over cases. None where undefined."""

    value: float | None
    low: float | None
    high: float | None


class LesionScores(Record):
    """The lesions of one structure in one case; voxdino.evaluation.lesions has the rules.

    volumes: of each lesion of the reference, ascending, in the unit of the summary.  found: whether it was found.
    num_predicted, num_true: lesions of the prediction, and those of them that are in the reference.
    """

    volumes: tuple[float, ...]
    found: tuple[bool, ...]
    num_predicted: int
    num_true: int


class LesionBin(Record):
    """Lesions of the reference with a volume above `low` and at most `high` (None: no limit)."""

    low: float | None
    high: float | None
    num: int
    num_found: int
    recall: Share


class LesionSummary(Record):
    """The lesions of one structure in all cases together (the summary of metrics has means over cases).

    unit:        of volumes: "mm³", in pictures "mm²", "px" where files state no spacing.
    min_overlap: share of a lesion that must be marked; 0: one voxel.
    by_tercile:  recall of the smaller, middle and larger third of the reference's lesions.
    by_volume:   recall between fixed volumes, the same for every data set.
    """

    structure: str
    unit: str
    min_overlap: float
    num_reference: int
    num_found: int
    num_predicted: int
    num_true: int
    recall: Share
    precision: Share
    f1: Share
    by_tercile: tuple[LesionBin, ...]
    by_volume: tuple[LesionBin, ...]


class StructureScores(Record):
    """One structure of one case.

    outcome: "both" masks hold it; "missed": only the reference does; "false alarm": only the prediction does;
             "absent": neither.
    values:  metric name -> number; None where it is undefined (the metric's rule for empty masks).
    lesions: None where no lesion-wise metric was asked for.
    """

    case: str
    structure: str
    outcome: Outcome
    values: dict[str, float | None]
    lesions: LesionScores | None = None


class FailedCase(Record):
    """A case that could not be scored, and why."""

    case: str
    message: str


class Summary(Record):
    """One metric of one structure over all scored cases; structure "mean" averages each case's structures first.

    mean:          over the cases where it is defined; None where it is nowhere.
    low, high:     95 % bootstrap interval of the mean over cases; None for fewer than two cases.
    num_undefined: cases left out of the mean because the metric is undefined in them.
    """

    structure: str
    metric: str
    definition: str
    unit: str
    mean: float | None
    low: float | None
    high: float | None
    num_cases: int
    num_undefined: int


class StructureCounts(Record):
    """In how many cases a structure was found, missed, wrongly claimed, or absent from both masks."""

    structure: str
    both: int
    missed: int
    false_alarm: int
    absent: int


class Scores(Record):
    """The result of `evaluate`.

    num_patients: where the intervals are over patients, how many (see `groups_to_draw`). None: over cases.
    empty: how empty masks count; "undefined": by every metric's own rule (`rules`).
    tolerance, length_unit: the tolerance of NSD and the unit of all lengths, "mm" ("px" where files state none).
    definitions: metric -> definition id.   rules: metric -> what it does with empty masks.
    lesions: per structure, where a lesion-wise metric was asked for.
    groups: case -> patient, of the scored cases that one is named of.
    """

    voxdino_version: str
    num_cases: int
    tolerance: float
    length_unit: str
    volume_unit: str
    definitions: dict[str, str]
    rules: dict[str, str]
    summary: tuple[Summary, ...]
    counts: tuple[StructureCounts, ...]
    warnings: tuple[str, ...]
    failed: tuple[FailedCase, ...]
    cases: tuple[StructureScores, ...]
    num_patients: int | None = None
    empty: Literal["undefined", "score"] = "undefined"
    lesions: tuple[LesionSummary, ...] = ()
    groups: dict[str, str] = Field(default={})

    def mean(self, metric: str = "dice", structure: str = "mean") -> float | None:
        """The mean of a metric over the cases: of one structure, or of the structures' average in each case."""
        rows = [row for row in self.summary if (row.structure, row.metric) == (structure, metric)]
        return rows[0].mean if rows else None
