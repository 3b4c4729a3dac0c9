"""scores.json: what was measured, case by case and over the cases, with the definition beside every number."""

from typing import Literal

from voxdino.core.records import Record

Outcome = Literal["both", "missed", "false alarm", "absent"]


class StructureScores(Record):
    """One structure of one case.

    outcome: "both" masks hold it; "missed": only the reference does; "false alarm": only the prediction does;
             "absent": neither.
    values:  metric name -> number; None where it is undefined (the metric's rule for empty masks).
    """

    case: str
    structure: str
    outcome: Outcome
    values: dict[str, float | None]


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

    tolerance, length_unit: the tolerance of NSD and the unit of all lengths, "mm" ("px" where files state none).
    definitions: metric -> definition id.   rules: metric -> what it does with empty masks.
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

    def mean(self, metric: str = "dice", structure: str = "mean") -> float | None:
        """The mean of a metric over the cases: of one structure, or of the structures' average in each case."""
        rows = [row for row in self.summary if (row.structure, row.metric) == (structure, metric)]
        return rows[0].mean if rows else None
