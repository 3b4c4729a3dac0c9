"""What a report says, without how it looks: a page of sections, each plain data that a program can build or compare.

Everything that is text may come from a file of a stranger: it is shown as text, never as markup.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field

from voxdino.core.records import Record


class Interval(Record):
    """A mean over cases with its 95 % interval; None where it is undefined. num_undefined: cases left out of it."""

    mean: float | None
    low: float | None
    high: float | None
    num_undefined: int = 0


Cell = str | int | float | Interval | None  # None is shown as a dash: undefined, or not measured
Fact = tuple[str, str]  # name and value


class Column(Record):
    """Heading of a column of a table.

    unit: shown behind the title.  digits: after the point, for floats and intervals; None: three significant ones.
    better: which direction is the better one: the best number of the column is set off; None for plain facts.
    """

    title: str
    unit: str = ""
    digits: int | None = Field(default=None, ge=0, le=9)
    better: Literal["higher", "lower"] | None = None


class TextSection(Record):
    """Paragraphs of prose, each a plain text."""

    kind: Literal["text"] = "text"
    title: str
    paragraphs: tuple[str, ...]


class TableSection(Record):
    """A table that a reader can sort, with a cell per column in each row; written as CSV, JSON, Markdown, LaTeX too."""

    kind: Literal["table"] = "table"
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


class Point(Record):
    """A point of a curve; low, high: its interval, where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(Record):
    """One line of a chart, its points in order of x."""

    name: str
    points: tuple[Point, ...]


class CurveSection(Record):
    """Lines over a common axis: learning curves, scaling with size, resolution or number of cases."""

    kind: Literal["curve"] = "curve"
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_is_log: bool = False
    note: str = ""


class ForestRow(NamedTuple):
    """One line of a forest plot."""

    name: str
    interval: Interval


class ForestSection(Record):
    """Intervals under each other on one axis: methods, structures or cases (there low and high are None)."""

    kind: Literal["forest"] = "forest"
    title: str
    axis_label: str
    rows: tuple[ForestRow, ...]
    note: str = ""


class RankSection(Record):
    """Mean ranks of methods over tasks (1 is best); those closer than `critical_difference` cannot be told apart."""

    kind: Literal["rank"] = "rank"
    title: str
    names: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    critical_difference: float
    note: str = ""


class ReliabilityBin(NamedTuple):
    """Predictions of similar confidence: mean confidence and accuracy in [0, 1], and how many there are."""

    confidence: float
    accuracy: float
    num: int


class ReliabilitySection(Record):
    """Stated confidence against observed accuracy; on the diagonal a model means what it says."""

    kind: Literal["reliability"] = "reliability"
    title: str
    bins: tuple[ReliabilityBin, ...]
    note: str = ""


class AgreementPoint(NamedTuple):
    """A quantity of one case, by the reference and as predicted."""

    case: str
    reference: float
    predicted: float


class AgreementSection(Record):
    """Differences over means (Bland and Altman, Lancet 1986) with the mean difference and the limits of agreement."""

    kind: Literal["agreement"] = "agreement"
    title: str
    unit: str
    points: tuple[AgreementPoint, ...]
    note: str = ""


class GalleryItem(NamedTuple):
    """A picture (PNG) with its caption and facts beside it."""

    caption: str
    png: bytes
    facts: tuple[Fact, ...] = ()


class GallerySection(Record):
    """Pictures in a grid."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    kind: Literal["gallery"] = "gallery"
    title: str
    items: tuple[GalleryItem, ...]
    note: str = ""


class FailedFile(NamedTuple):
    """A file or case that could not be worked on, and why."""

    file: str
    message: str


class FailureSection(Record):
    """What failed; an empty list says that nothing did."""

    kind: Literal["failure"] = "failure"
    title: str
    items: tuple[FailedFile, ...]


Section = Annotated[
    TextSection
    | TableSection
    | CurveSection
    | ForestSection
    | RankSection
    | ReliabilitySection
    | AgreementSection
    | GallerySection
    | FailureSection,
    Field(discriminator="kind"),
]


class ReportPage(Record):
    """One report. facts: a few words each at the top ("cases", "41").  warnings: what a reader must know first."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    title: str
    subtitle: str
    facts: tuple[Fact, ...] = ()
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...]
