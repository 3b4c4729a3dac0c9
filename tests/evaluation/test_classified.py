"""Probabilities of a classifier are scored against the cases they belong to, over patients where they are known."""

import numpy as np
import pytest

from voxdino.core.errors import DatasetError, UsageError
from voxdino.evaluation import cohort
from voxdino.evaluation.classification import classification_scores
from voxdino.evaluation.classified import evaluate_classes
from voxdino.evaluation.cohort import cohort_intervals, interval, logit_interval
from voxdino.preparation.classification import ClassificationSet, LabelledCase

LABELS = np.arange(40) % 3 == 0


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(cohort, "NUM_RESAMPLES", 200)
    cohort.resamples.cache_clear()
    yield
    cohort.resamples.cache_clear()


def shares_of(labels, seed=0, strength=1.0):
    noise = np.random.default_rng(seed).normal(size=len(labels))
    positive = 1 / (1 + np.exp(-strength * (2 * labels - 1) - noise))
    return np.stack((1 - positive, positive), axis=1)


def labelled(tmp_path, *, groups=False, kind="single", classes=("no", "yes")):
    def case(place, label):
        labels = (int(label), int(place % 2)) if kind == "multi" else (int(label),)
        return LabelledCase(f"case_{place}", tmp_path, labels, group=f"p{place // 4}" if groups else None)

    cases = tuple(case(place, label) for place, label in enumerate(LABELS))
    other = (LabelledCase("other", tmp_path, (0,)),)
    return ClassificationSet("toy", tmp_path, kind, 2, classes, {"train": other, "val": (), "test": cases}, "")


def write_table(folder, shares, *, header="case,predicted,no,yes", cases=None):
    rows = [f"{name},?,{a:.6f},{b:.6f}" for name, (a, b) in zip(cases or names(), shares, strict=True)]
    (folder / "probabilities.csv").write_text("\n".join([header, *rows]) + "\n")


def names():
    return [f"case_{place}" for place in range(len(LABELS))]


def test_scores_are_those_of_the_metrics_and_lie_in_their_intervals(tmp_path, few_draws):
    shares = shares_of(LABELS).round(6)
    write_table(tmp_path, shares)
    found = evaluate_classes(tmp_path, labelled(tmp_path))
    expected = classification_scores(LABELS.astype(int), shares)
    assert {one.metric: one.score.value for one in found.summary} == pytest.approx(expected)
    auroc = found.summary[0].score
    assert auroc.low < auroc.value < auroc.high and found.num_patients is None
    assert [(one.name, one.num_reference) for one in found.counts] == [("no", 26), ("yes", 14)]
    assert any("40 cases" in told for told in found.warnings)


def test_columns_may_come_in_any_order(tmp_path, few_draws):
    write_table(tmp_path, shares_of(LABELS))
    first = evaluate_classes(tmp_path, labelled(tmp_path), metrics=["auroc"])
    write_table(tmp_path, shares_of(LABELS)[:, ::-1], header="case,predicted,yes,no")
    assert evaluate_classes(tmp_path, labelled(tmp_path), metrics=["auroc"]) == first


def test_several_labels_are_scored_label_by_label(tmp_path, few_draws):
    write_table(tmp_path, np.stack((LABELS * 0.8 + 0.1, np.arange(40) % 2 * 0.7), axis=1))
    found = evaluate_classes(tmp_path, labelled(tmp_path, kind="multi"), metrics=["auroc", "accuracy"])
    assert [one.score.value for one in found.summary] == [1.0, 1.0]
    assert found.cases[3].reference == found.cases[3].predicted == "no|yes"


def test_intervals_are_over_patients_where_they_are_named(tmp_path, few_draws):
    repeated = np.repeat(np.arange(12) % 2 == 0, 6)
    shares = np.repeat(shares_of(np.arange(12) % 2 == 0, strength=0.3), 6, axis=0)
    labels, patients = repeated.astype(int), np.repeat(np.arange(12), 6).tolist()
    alone = cohort_intervals(labels, shares, ["accuracy"])["accuracy"]
    together = cohort_intervals(labels, shares, ["accuracy"], groups=patients)["accuracy"]
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    write_table(tmp_path, shares_of(LABELS))
    found = evaluate_classes(tmp_path, labelled(tmp_path, groups=True), metrics=["auroc"])
    assert found.num_patients == 10 and found.groups["case_39"] == "p9"


def test_five_patients_have_intervals_over_their_cases_and_a_warning(tmp_path, few_draws):
    write_table(tmp_path, shares_of(LABELS))
    patients = {name: f"p{place % 5}" for place, name in enumerate(names())}
    found = evaluate_classes(tmp_path, labelled(tmp_path), metrics=["auroc"], groups=patients)
    assert found.summary == evaluate_classes(tmp_path, labelled(tmp_path), metrics=["auroc"]).summary
    assert found.num_patients is None and "5 patients are too few" in found.warnings[-1]


def test_one_patient_has_no_interval():
    found = cohort_intervals(np.array([0, 1, 1]), shares_of(np.array([0, 1, 1])), ["auroc"], groups=["a", "a", "a"])
    assert found["auroc"].value is not None and found["auroc"].low is None


def test_intervals_hold_the_true_area_in_19_of_20_samples(few_draws):
    """Normal scores one standard deviation apart: the area is Phi(1 / sqrt 2) = 0.7602."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng([7, seed])
        labels = np.arange(100) % 2
        positive = 1 / (1 + np.exp(-rng.normal(labels, 1.0)))
        found = cohort_intervals(labels, np.stack((1 - positive, positive), axis=1), ["auroc"])["auroc"]
        held += found.low <= 0.7602 <= found.high
    assert 89 <= held <= 99


def test_intervals_of_a_high_auroc_of_few_cases_hold_the_truth():
    """Binormal scores of AUROC 0.96: 50 cases, 15 of them ill on average."""
    rng, num_cases, truth = np.random.default_rng(0), 50, 0.96
    held = {interval: 0, logit_interval: 0}
    for _ in range(400):
        ill = np.arange(num_cases) < rng.binomial(num_cases, 0.3)
        scores = rng.normal(np.sqrt(2) * 1.750686 * ill)  # 0.96 is the normal share below 1.750686
        wins = (scores[ill][:, None] > scores[~ill]).astype(float)
        drawn = rng.multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=300).astype(float)
        pairs = drawn[:, ill].sum(axis=1) * drawn[:, ~ill].sum(axis=1)
        won = ((drawn[:, ill] @ wins) * drawn[:, ~ill]).sum(axis=1)
        for kind in held:
            found = kind(wins.mean(), (won[pairs > 0] / pairs[pairs > 0]).tolist())
            held[kind] += found.low <= truth <= found.high
    assert held[interval] < 0.88 * 400 and 0.92 * 400 <= held[logit_interval] <= 0.98 * 400


@pytest.mark.parametrize("value, drawn", [(1.0, [1.0, 1.0]), (0.8, [0.8, 0.8]), (0.9, [np.nan, 0.9, 0.9])])
def test_an_interval_of_no_spread_is_its_value(value, drawn):
    found = logit_interval(value, drawn)
    assert found.low <= value <= found.high and found.high - found.low == pytest.approx(0, abs=1e-12)


def test_cases_without_probabilities_are_listed(tmp_path, few_draws):
    write_table(tmp_path, shares_of(LABELS)[:-2], cases=names()[:-2])
    found = evaluate_classes(tmp_path, labelled(tmp_path))
    assert [one.case for one in found.failed] == ["case_38", "case_39"] and found.num_cases == 38


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"header": "case,predicted,no,maybe"}, "maybe"),
        ({"cases": [*names()[:-1], "case_99"]}, "none of the set's, among them case_99"),
        ({"cases": [*names()[:-1], "case_0"]}, "comes twice"),
    ],
)
def test_a_table_of_another_set_is_refused(tmp_path, change, told):
    write_table(tmp_path, shares_of(LABELS), **change)
    with pytest.raises(DatasetError, match=told):
        evaluate_classes(tmp_path, labelled(tmp_path))


def test_an_unknown_metric_is_refused_with_the_nearest(tmp_path):
    write_table(tmp_path, shares_of(LABELS))
    with pytest.raises(UsageError, match="Did you mean 'auroc'"):
        evaluate_classes(tmp_path, labelled(tmp_path), metrics=["aurok"])
