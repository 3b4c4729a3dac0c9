"""Laws of the classification metrics: agreement with scikit-learn, the examples by hand, and what is undefined."""

import itertools
import warnings
from math import isnan

import numpy as np
import pytest
from sklearn import metrics as sk

from voxdino.core.errors import InputError, UsageError
from voxdino.evaluation.classification import CLASSIFICATION_METRICS, classification_scores, reliability_bins


def single(num_classes, seed=0, num=97, decimals=2):
    """Labels and probabilities with ties, better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    logits = rng.normal(size=(num, num_classes)) + 1.2 * (labels[:, None] == np.arange(num_classes))
    values = np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), decimals)
    return labels, values / values.sum(axis=1, keepdims=True)


def findings(num_findings, seed=0, num=97):
    rng = np.random.default_rng(seed)
    labels = (rng.random((num, num_findings)) < rng.uniform(0.1, 0.6, num_findings)).astype(np.int64)
    return labels, np.round(np.clip(0.3 * labels + 0.7 * rng.random((num, num_findings)), 0, 1), 2)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_one_class_per_case_agrees_with_scikit_learn(num_classes, seed):
    labels, probabilities = single(num_classes, seed)
    said, one_hot = probabilities.argmax(axis=1), np.eye(num_classes, dtype=int)[labels]
    positive = slice(1, 2) if num_classes == 2 else slice(None)
    wanted = {
        "auroc": sk.roc_auc_score(one_hot[:, positive], probabilities[:, positive], average="macro"),
        "auprc": sk.average_precision_score(one_hot[:, positive], probabilities[:, positive], average="macro"),
        "accuracy": sk.accuracy_score(labels, said),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said),
        "f1": sk.f1_score(labels, said, average="macro"),
        "mcc": sk.matthews_corrcoef(labels, said),
        "brier": np.mean([((p - y) ** 2).sum() / 2 for p, y in zip(probabilities, one_hot, strict=True)]),
    }
    if num_classes == 2:
        assert wanted["brier"] == pytest.approx(sk.brier_score_loss(labels, probabilities[:, 1]))
    got = classification_scores(labels, probabilities)
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_findings_agree_with_scikit_learn(seed):
    labels, probabilities = findings(5, seed)
    said = probabilities > 0.5
    columns = range(labels.shape[1])
    wanted = {
        "auroc": sk.roc_auc_score(labels, probabilities, average="macro"),
        "auprc": sk.average_precision_score(labels, probabilities, average="macro"),
        "accuracy": (labels == said).mean(),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(labels[:, k], said[:, k]) for k in columns]),
        "f1": sk.f1_score(labels, said, average="macro"),
        "mcc": np.mean([sk.matthews_corrcoef(labels[:, k], said[:, k]) for k in columns]),
        "brier": np.mean([sk.brier_score_loss(labels[:, k], probabilities[:, k]) for k in columns]),
    }
    got = classification_scores(labels, probabilities)
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("draw", [lambda: single(4), lambda: findings(4)], ids=["classes", "findings"])
def test_calibration_error_and_reliability_bins_equal_a_slow_count(draw):
    labels, probabilities = draw()
    if labels.ndim == 1:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    else:
        confidence, right = probabilities.ravel(), labels.ravel() == 1
    wanted, error = [], 0.0
    edges = [k / 15 for k in range(16)]
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if low == 0:
            inside |= confidence == 0
        if inside.any():
            wanted.append((confidence[inside].mean(), right[inside].mean(), inside.sum()))
            error += inside.mean() * abs(wanted[-1][0] - wanted[-1][1])
    bins = reliability_bins(labels, probabilities)
    np.testing.assert_allclose([(one.confidence, one.accuracy, one.count) for one in bins], wanted)
    assert classification_scores(labels, probabilities, ["ece"]) == {"ece": pytest.approx(error)}
    assert sum(one.count for one in reliability_bins(labels, probabilities, num_bins=4)) == len(confidence)


@pytest.mark.parametrize("name", CLASSIFICATION_METRICS)
@pytest.mark.parametrize("draw", [lambda: single(3), lambda: findings(3)], ids=["classes", "findings"])
def test_every_metric_is_best_for_the_truth_and_blind_to_the_order_of_cases(name, draw):
    labels, probabilities = draw()
    truth = np.eye(3)[labels] if labels.ndim == 1 else labels.astype(float)
    metric = CLASSIFICATION_METRICS[name]
    assert classification_scores(labels, truth)[name] == {"higher": 1.0, "lower": 0.0}[metric.better]
    order = np.random.default_rng(1).permutation(len(labels))
    mixed = classification_scores(labels[order], probabilities[order])[name]
    assert mixed == pytest.approx(classification_scores(labels, probabilities)[name], abs=1e-12)
    assert metric.definition.startswith(name.replace("_", "-")) and metric.rule


def test_equal_probabilities_are_worth_chance():
    labels = np.array([0, 1, 1, 0, 1])
    got = classification_scores(labels, np.full((5, 2), 0.5))
    assert got["auroc"] == 0.5 and got["auprc"] == pytest.approx(3 / 5)
    assert got["mcc"] == 0.0 and got["balanced_accuracy"] == 0.5


def test_absent_classes_are_left_out_and_one_class_alone_is_undefined():
    labels, probabilities = single(3)
    there = labels != 2
    got = classification_scores(labels[there], probabilities[there])
    one_hot = np.eye(3, dtype=int)[labels[there]]
    both = [sk.roc_auc_score(one_hot[:, k], probabilities[there][:, k]) for k in (0, 1)]
    assert got["auroc"] == pytest.approx(np.mean(both))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns that classes are said which are not there
        said = probabilities[there].argmax(axis=1)
        assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels[there], said))
    alone = classification_scores(np.zeros(4, int), np.tile([0.9, 0.1], (4, 1)))
    assert isnan(alone["auroc"]) and isnan(alone["auprc"]) and isnan(alone["mcc"])
    assert (alone["accuracy"], alone["balanced_accuracy"], alone["f1"]) == (1.0, 1.0, 1.0)
    assert alone["ece"] == pytest.approx(0.1) and alone["brier"] == pytest.approx(0.01)
    nothing = classification_scores(np.zeros((3, 1), int), np.zeros((3, 1)))
    undefined = {name for name, value in nothing.items() if isnan(value)}
    assert undefined == {"auroc", "auprc", "balanced_accuracy", "f1", "mcc"}


@pytest.mark.parametrize(
    "labels, probabilities, words",
    [
        ([0, 1], [[0.5, 0.5]], "labels of shape"),
        ([], np.zeros((0, 2)), "at least one case"),
        ([0, 1], [[0.2, 0.8], [-3.0, 4.0]], "not logits"),
        ([0, 1], [[0.2, 0.8], [np.nan, 0.5]], "not logits"),
        ([0, 2], [[0.2, 0.8], [0.5, 0.5]], "class numbers from 0 to 2 for 2 classes"),
        ([0, 1], [[0.9, 0.8], [0.5, 0.5]], "do not sum to 1"),
        ([[0, 2]], [[0.9, 0.8]], "other than 0 and 1"),
    ],
)
def test_what_is_no_label_or_probability_is_refused(labels, probabilities, words):
    with pytest.raises(InputError, match=words):
        classification_scores(np.array(labels, dtype=np.int64), np.array(probabilities))


def test_an_unknown_classification_metric_gets_the_nearest_name():
    with pytest.raises(UsageError, match="Did you mean 'auroc'"):
        classification_scores(np.array([0, 1]), np.eye(2), ["auroq"])
