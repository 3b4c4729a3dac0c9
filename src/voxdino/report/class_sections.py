"""The sections of a page about a classifier: metrics, classes, reliability, cases."""

from voxdino.evaluation.classification import CLASSIFICATION_METRICS
from voxdino.evaluation.classified import ClassScores
from voxdino.evaluation.scores import Share
from voxdino.report.page import (
    Cell,
    Column,
    FailedFile,
    FailureSection,
    ForestRow,
    ForestSection,
    Interval,
    ReliabilityBin,
    ReliabilitySection,
    Section,
    TableSection,
)

HEADINGS = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "mcc": "MCC", "ece": "ECE", "brier": "Brier"}
MOST_CASES = 2000  # rows of the table of cases; all are in scores.json


def class_facts(scores: ClassScores) -> tuple[tuple[str, str], ...]:
    """What stands at the top of the page."""
    facts = [("cases", str(scores.num_cases)), ("classes", str(len(scores.classes)))]
    first = scores.summary[0]
    if first.score.value is not None:
        facts.insert(0, (_heading(first.metric), f"{first.score.value:.3f}"))
    if scores.num_patients is not None:
        facts.append(("patients", str(scores.num_patients)))
    return tuple(facts)


def class_sections(scores: ClassScores) -> tuple[Section, ...]:
    """Everything that scores.json of a classifier says."""
    metrics: tuple[tuple[Cell, ...], ...] = tuple(
        (_heading(one.metric), _interval(one.score), CLASSIFICATION_METRICS[one.metric].better, one.definition)
        for one in scores.summary
    )
    columns = (Column(title="Metric"), Column(title="Score", digits=3), Column(title="Better"))
    over = "cases" if scores.num_patients is None else "patients"
    rows = tuple(ForestRow(_heading(one.metric), _interval(one.score)) for one in scores.summary)
    bins = tuple(ReliabilityBin(one.confidence, one.accuracy, one.num) for one in scores.reliability)
    counts = tuple((one.name, one.num_reference, one.num_predicted) for one in scores.counts)
    failed = tuple(FailedFile(one.case, one.message) for one in scores.failed)
    return (
        TableSection(
            title="Scores",
            columns=(*columns, Column(title="Definition")),
            rows=metrics,
            note=f"With 95 % bootstrap intervals over {over}.",
        ),
        ForestSection(title="Intervals", axis_label="score", rows=rows),
        ReliabilitySection(title="Reliability", bins=bins),
        TableSection(
            title="Classes",
            columns=(Column(title="Class"), Column(title="Cases"), Column(title="Said of")),
            rows=counts,
        ),
        _cases(scores),
        FailureSection(title="What failed", items=failed),
    )


def _cases(scores: ClassScores) -> TableSection:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (one.case, one.reference, one.predicted, *one.probabilities) for one in scores.cases[:MOST_CASES]
    )
    columns = (Column(title="Case"), Column(title="Reference"), Column(title="Predicted"))
    chances = tuple(Column(title=f"Probability of {name}", digits=3) for name in scores.classes)
    note = f"The first {MOST_CASES} of {scores.num_cases} cases." if scores.num_cases > MOST_CASES else ""
    return TableSection(title="Cases", columns=(*columns, *chances), rows=rows, note=note)


def _heading(metric: str) -> str:
    return HEADINGS.get(metric, metric.replace("_", " "))


def _interval(score: Share) -> Interval:
    return Interval(mean=score.value, low=score.low, high=score.high)
