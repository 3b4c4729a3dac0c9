"""CLASSIFICATION_METRICS: scores of predicted probabilities, with one definition each and a rule for undefined cases.

Two kinds of labels: one class per case (labels (N,), probabilities (N, K) with rows that sum to 1; ordinal grades too),
or K findings that are there or not (labels (N, K) of 0 and 1, probabilities of each). Of one class per case the class
with the highest probability is the answer; a finding is said to be there above 0.5.

With two classes, AUROC and AUPRC are those of class 1 (AUROC is the same for both). Otherwise both are means over the
classes, each against all others, as MedMNIST's evaluator does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import getdoc
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy.typing import NDArray

from voxdino.core.errors import InputError, UsageError
from voxdino.core.records import nearest

NUM_BINS = 15
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Answers:
    """Labels and probabilities of N cases, brought into one form.

    is_there:      (N, K) truth of every class or finding.  is_said: (N, K) the answer.
    probabilities: (N, K).  is_single: every case has one class.
    """

    is_there: Bool[np.ndarray, "N K"]
    is_said: Bool[np.ndarray, "N K"]
    probabilities: Float[np.ndarray, "N K"]
    is_single: bool

    @property
    def columns(self) -> slice:
        """The columns that one-against-all measures are taken of: of two classes the second alone."""
        return slice(1, 2) if self.is_single and self.is_there.shape[1] == 2 else slice(None)

    @property
    def confusion(self) -> Float[np.ndarray, "K 4"]:
        """Per column the cases: there and said, there and not said, said but not there, neither."""
        there, said = self.is_there, self.is_said
        counts = [there & said, there & ~said, ~there & said, ~there & ~said]
        return np.stack([count.sum(axis=0) for count in counts], axis=1).astype(np.float64)


@dataclass(frozen=True)
class ClassificationMetric:
    """One score of N cases. What is undefined, and what is said then, is in the docstring of `compute`."""

    compute: Callable[[Answers], float]
    better: Literal["higher", "lower"]
    definition: str

    @property
    def rule(self) -> str:
        return getdoc(self.compute) or ""


@dataclass(frozen=True)
class ReliabilityBin:
    """Cases whose confidence lies in one of equally wide bins: mean confidence, share that was right, their number."""

    confidence: float
    accuracy: float
    count: int


def classification_scores(
    labels: Integer[np.ndarray, "..."], probabilities: Float[np.ndarray, "N K"], metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """Name -> value for each of CLASSIFICATION_METRICS (or of those named); NaN where one is undefined.

    labels: (N,) class numbers from 0 to K - 1, or (N, K) of 0 and 1.
    Errors: InputError for labels or probabilities that are none; UsageError for an unknown metric.
    """
    answers = read_answers(labels, probabilities)
    names = CLASSIFICATION_METRICS if metrics is None else metrics
    for name in names:
        if name not in CLASSIFICATION_METRICS:
            known = ", ".join(CLASSIFICATION_METRICS)
            raise UsageError(f"unknown metric '{name}'.{nearest(name, CLASSIFICATION_METRICS)}", fix=f"known: {known}.")
    return {name: CLASSIFICATION_METRICS[name].compute(answers) for name in names}


def read_answers(labels: Integer[np.ndarray, "..."], probabilities: Float[np.ndarray, "N K"]) -> Answers:
    """Labels and probabilities, checked; arguments and errors are those of `classification_scores`."""
    values = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 2 or not len(values) or values.shape[1] < (2 if labels.ndim == 1 else 1):
        raise _refused(f"probabilities of shape {values.shape}", "give (cases, classes), at least one case")
    if labels.shape not in ((len(values),), values.shape):
        raise _refused(f"labels of shape {labels.shape} for probabilities of shape {values.shape}", "give one per case")
    if not (np.isfinite(values).all() and values.min() >= -1e-6 and values.max() <= 1 + 1e-6):
        raise _refused("probabilities that are not between 0 and 1", "give probabilities, not logits")
    if labels.ndim == 2:
        if not np.isin(labels, (0, 1)).all():
            raise _refused("labels of findings other than 0 and 1", "1 is there, 0 is not")
        return Answers(labels == 1, values > 0.5, values, is_single=False)
    if labels.min() < 0 or labels.max() >= values.shape[1]:
        fact = f"class numbers from {labels.min()} to {labels.max()} for {values.shape[1]} classes"
        raise _refused(fact, "number them from 0")
    if np.abs(values.sum(axis=1) - 1).max() > 1e-3:
        raise _refused("probabilities of a case that do not sum to 1", "give findings as labels (cases, findings)")
    classes = np.arange(values.shape[1])
    return Answers(labels[:, None] == classes, values.argmax(axis=1)[:, None] == classes, values, is_single=True)


def reliability_bins(
    labels: Integer[np.ndarray, "..."], probabilities: Float[np.ndarray, "N K"], *, num_bins: int = NUM_BINS
) -> tuple[ReliabilityBin, ...]:
    """What a reliability diagram shows, bins without a case left out; same arguments and errors as the scores."""
    return _bins(read_answers(labels, probabilities), num_bins)


def auroc(answers: Answers) -> float:
    """Area under the ROC curve; equal probabilities count half.

    The mean over the classes that some cases have and some lack; no such class: NaN.
    """
    return _mean_over_classes(answers, _auroc)


def auprc(answers: Answers) -> float:
    """Average precision (no interpolation). Mean over the classes that some cases have; none: NaN."""
    return _mean_over_classes(answers, _average_precision)


def accuracy(answers: Answers) -> float:
    """Share of right answers; with findings, of all (case, finding) pairs. Always defined."""
    if answers.is_single:
        return float((answers.is_there & answers.is_said).any(axis=1).mean())
    return float((answers.is_there == answers.is_said).mean())


def balanced_accuracy(answers: Answers) -> float:
    """Mean recall of the classes that occur; of findings: the mean of sensitivity and specificity, then over findings.

    A finding that all cases have, or none, is left out; nothing left: NaN.
    """
    hit, missed, invented, rightly_not = answers.confusion.T
    sensitivity = _ratio(hit, hit + missed)
    if answers.is_single:
        return _mean(sensitivity)
    return _mean((sensitivity + _ratio(rightly_not, rightly_not + invented)) / 2)


def f1(answers: Answers) -> float:
    """Mean over classes of the harmonic mean of precision and recall. Classes neither there nor said are left out.

    Nothing left: NaN.
    """
    hit, missed, invented, _ = answers.confusion.T
    return _mean(_ratio(2 * hit, 2 * hit + missed + invented))


def mcc(answers: Answers) -> float:
    """Matthews correlation of answers and truth (of K classes: Gorodkin 2004); of findings the mean over findings.

    All answers alike: 0. All cases alike: NaN; findings that all cases have or none are left out.
    """
    if answers.is_single:
        there, said = answers.is_there.astype(np.float64), answers.is_said.astype(np.float64)
        return _correlation(there - there.mean(axis=0), said - said.mean(axis=0))
    columns = zip(answers.is_there.T.astype(np.float64), answers.is_said.T.astype(np.float64), strict=True)
    return _mean(np.array([_correlation(there - there.mean(), said - said.mean()) for there, said in columns]))


def ece(answers: Answers) -> float:
    """Expected calibration error over 15 equally wide bins (Guo et al. 2017): mean of |confidence - share right|.

    The confidence is that of the answer; of findings: the probability of each, against how often it is there.
    Always defined.
    """
    bins = _bins(answers, NUM_BINS)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / sum(one.count for one in bins)


def brier(answers: Answers) -> float:
    """Mean squared difference of probabilities and truth, of classes: half its sum over the classes. Always defined."""
    squared = (answers.probabilities - answers.is_there) ** 2
    return float(squared.sum(axis=1).mean() / 2 if answers.is_single else squared.mean())


CLASSIFICATION_METRICS: dict[str, ClassificationMetric] = {
    "auroc": ClassificationMetric(auroc, "higher", "auroc:one-vs-rest-macro"),
    "auprc": ClassificationMetric(auprc, "higher", "auprc:average-precision-macro"),
    "accuracy": ClassificationMetric(accuracy, "higher", "accuracy:argmax-or-above-0.5"),
    "balanced_accuracy": ClassificationMetric(balanced_accuracy, "higher", "balanced-accuracy:mean-recall"),
    "f1": ClassificationMetric(f1, "higher", "f1:macro"),
    "mcc": ClassificationMetric(mcc, "higher", "mcc:gorodkin"),
    "ece": ClassificationMetric(ece, "lower", "ece:15-equal-width-bins"),
    "brier": ClassificationMetric(brier, "lower", "brier:half-sum-over-classes"),
}


def _refused(fact: str, fix: str) -> InputError:
    return InputError(f"{fact}.", where="classification scores", fix=f"{fix}.")


def _confidences(answers: Answers) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Of every answer (or finding): the probability it was given, and whether it came true."""
    if answers.is_single:
        return answers.probabilities.max(axis=1), (answers.is_there & answers.is_said).any(axis=1)
    return answers.probabilities.ravel(), answers.is_there.ravel()


def _bins(answers: Answers, num_bins: int) -> tuple[ReliabilityBin, ...]:
    confidence, is_right = _confidences(answers)
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence)  # a bin holds its upper end
    counts = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=values, minlength=num_bins) for values in (confidence, is_right)]
    return tuple(
        ReliabilityBin(float(sums[0][i] / counts[i]), float(sums[1][i] / counts[i]), int(counts[i]))
        for i in np.flatnonzero(counts)
    )


def _mean_over_classes(answers: Answers, of_one: Callable[[NDArray[np.bool_], NDArray[np.float64]], float]) -> float:
    columns = zip(answers.is_there.T[answers.columns], answers.probabilities.T[answers.columns], strict=True)
    return _mean(np.array([of_one(there, probability) for there, probability in columns]))


def _auroc(is_there: NDArray[np.bool_], probability: NDArray[np.float64]) -> float:
    """Share of (there, not there) pairs in the right order."""
    positive, negative = probability[is_there], np.sort(probability[~is_there])
    if not (len(positive) and len(negative)):
        return NAN
    below = [np.searchsorted(negative, positive, side=side).sum(dtype=np.float64) for side in ("left", "right")]
    return float(sum(below) / 2 / (len(positive) * len(negative)))


def _average_precision(is_there: NDArray[np.bool_], probability: NDArray[np.float64]) -> float:
    """Precision at every threshold, weighted by the recall that it adds."""
    if not is_there.any():
        return NAN
    order = np.argsort(-probability, kind="stable")
    hits = np.cumsum(is_there[order])
    last = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)  # equal probabilities: one threshold
    precision = hits[last] / (last + 1)
    return float((precision * np.diff(hits[last], prepend=0)).sum() / hits[-1])


def _correlation(there: NDArray[np.float64], said: NDArray[np.float64]) -> float:
    """Of centred values; 0 where the answers do not vary, NaN where the truth does not."""
    variances = float((there**2).sum()), float((said**2).sum())
    if variances[0] == 0:
        return NAN
    return float((there * said).sum() / np.sqrt(variances[0] * variances[1])) if variances[1] else 0.0


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), NAN)


def _mean(values: NDArray[np.float64]) -> float:
    """Of the defined values."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else NAN
