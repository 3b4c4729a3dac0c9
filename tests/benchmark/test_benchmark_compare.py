"""Intervals hold the value, tests see what is there and do not see what is not."""

import numpy as np
import pytest
from small_benchmark import classified, segmented

from voxdino.benchmark import compare as module
from voxdino.benchmark.compare import compare, groups_of, interval_of, labels_of, value_of
from voxdino.benchmark.result import CellResult
from voxdino.evaluation import cohort


def noisy(labels, strength, seed):
    return 1 / (1 + np.exp(-strength * (2 * labels - 1) - np.random.default_rng(seed).normal(size=len(labels))))


LABELS = np.arange(60) % 3 == 0


def test_an_interval_holds_its_value(few_draws):
    result = classified("a", LABELS, noisy(LABELS, 0.8, 0))
    for metric in ("auroc", "accuracy"):
        found = interval_of(result, metric)
        assert found.low < found.mean < found.high
        assert found.mean == value_of(result, metric)


def test_patients_are_drawn_whole(few_draws):
    result = classified("a", LABELS, noisy(LABELS, 0.8, 0))
    doubled = result.model_copy(
        update={
            "cases": tuple(f"{case}_{copy}" for copy in "ab" for case in result.cases),
            "labels": result.labels * 2,
            "probabilities": result.probabilities * 2,
            "groups": result.cases * 2,
        }
    )
    assert interval_of(doubled, "auroc").low == pytest.approx(interval_of(result, "auroc").low, abs=0.03)


def test_no_difference_is_found_between_a_method_and_itself(few_draws):
    same = [classified(name, LABELS, noisy(LABELS, 1.0, 3)) for name in "ab"]
    organs = [segmented(name, np.linspace(0.3, 0.9, 12)) for name in "ab"]
    for one in compare([same, organs], ["auroc", "dice"]):
        assert (one.p, one.p_holm, one.difference.mean) == (1.0, 1.0, 0.0)


def test_a_better_method_is_found_better(few_draws):
    good, bad = classified("good", LABELS, noisy(LABELS, 2.0, 1)), classified("bad", LABELS, noisy(LABELS, 0.0, 2))
    (one,) = compare([[good, bad]], ["auroc"])
    assert one.p < 0.05 and one.difference.low > 0 and one.detectable is None


def test_probabilities_of_another_scale_are_the_same_method(few_draws):
    share, other = noisy(LABELS, 0.5, 1), noisy(LABELS, 0.9, 2)
    (plain,) = compare([[classified("a", LABELS, share), classified("b", LABELS, other)]], ["auroc"])
    (squeezed,) = compare([[classified("a", LABELS, share**7), classified("b", LABELS, other)]], ["auroc"])
    assert (plain.p, plain.difference) == (squeezed.p, squeezed.difference)


def test_the_exchange_test_holds_its_level(few_draws, monkeypatch):
    module._exchanges.cache_clear()
    cohort.resamples.cache_clear()
    monkeypatch.setattr(module, "NUM_PERMUTATIONS", 59)
    monkeypatch.setattr(cohort, "NUM_RESAMPLES", 2)
    rejected = 0
    for seed in range(40):
        pair = [classified(name, LABELS, noisy(LABELS, 0.7, [seed, place])) for place, name in enumerate("ab")]
        rejected += compare([pair], ["auroc"])[0].p < 0.05
    module._exchanges.cache_clear()
    cohort.resamples.cache_clear()
    assert rejected <= 6


def test_means_are_compared_on_the_cases_that_both_have():
    a, b = np.linspace(0.4, 0.8, 10), np.linspace(0.4, 0.8, 10) - 0.1
    first, second = segmented("a", a), segmented("b", b)
    shorter = {metric: values[2:] for metric, values in second.scores.items()}
    second = second.model_copy(update={"cases": second.cases[2:], "scores": shorter})
    (one,) = compare([[first, second]], ["dice"])
    assert one.difference.mean == pytest.approx(0.1) and one.p < 0.01 and one.detectable == pytest.approx(0, abs=1e-6)


def test_holm_corrects_over_all_tasks():
    pairs = [[segmented(name, np.linspace(0.2, 0.9, 8) + shift) for name, shift in (("a", 0.0), ("b", 0.01))]] * 5
    assert all(one.p_holm == pytest.approx(min(1.0, 5 * one.p)) for one in compare(pairs, ["dice"] * 5))


def test_an_undefined_metric_has_no_winner(few_draws):
    one_class = np.zeros(20, dtype=bool)
    pair = [classified(name, one_class, noisy(one_class, 1.0, seed)) for seed, name in enumerate("ab")]
    (one,) = compare([pair], ["auroc"])
    assert (one.p, one.p_holm, one.difference.mean) == (1.0, 1.0, None)


def test_the_difference_that_could_have_been_shown_is_that_of_the_patients():
    a, b = np.random.default_rng(5).normal([[0.7], [0.6]], 0.1, (2, 12))
    alone = [segmented("a", a), segmented("b", b)]
    thrice = [segmented(name, np.repeat(scores, 3)) for name, scores in (("a", a), ("b", b))]
    patients = tuple(np.repeat([f"p{place}" for place in range(12)], 3).tolist())
    thrice = [one.model_copy(update={"groups": patients}) for one in thrice]
    (one,), (other,) = compare([alone], ["dice"]), compare([thrice], ["dice"])
    assert (other.p, other.detectable) == pytest.approx((one.p, one.detectable))


@pytest.mark.parametrize("num", [1, 2, 5])
def test_a_held_out_site_has_an_interval_over_its_cases(few_draws, num):
    sites = {"groups": tuple(f"site_{place % num}" for place in range(60))}
    for plain, metric in (
        (classified("a", LABELS, noisy(LABELS, 0.8, 0)), "auroc"),
        (segmented("a", np.linspace(0.3, 0.9, 60) ** 2), "dice"),
    ):
        assert interval_of(plain.model_copy(update=sites), metric) == interval_of(plain, metric)
        worse = plain.model_copy(update={"labels": plain.labels[::-1], "scores": {"dice": (0.2,) * 60}})
        (one,) = compare([[plain, worse]], [metric])
        (of_sites,) = compare([[plain.model_copy(update=sites), worse.model_copy(update=sites)]], [metric])
        assert of_sites == one and one.difference.low is not None


def test_patients_without_a_value_do_not_count():
    dices = tuple(place / 50 if place % 10 < 3 else None for place in range(40))
    plain = segmented("a", np.zeros(40)).model_copy(update={"scores": {"dice": dices}})
    whole, patients = segmented("b", np.full(40, 0.5)), {"groups": tuple(f"p{place % 10}" for place in range(40))}
    grouped, other = (one.model_copy(update=patients) for one in (plain, whole))
    assert interval_of(grouped, "dice") == interval_of(plain, "dice") and groups_of(other, "dice")
    assert compare([[other, grouped]], ["dice"]) == compare([[whole, plain]], ["dice"])


def without_kind(value):
    """As earlier versions wrote it."""
    return CellResult.from_json({key: part for key, part in value.items() if key != "kind"})


def test_one_finding_of_a_set_of_several_labels_is_no_class(few_draws):
    share = noisy(LABELS, 0.8, 0)
    value = classified("a", LABELS, share).to_json() | {"probabilities": [[float(p)] for p in share]}
    auroc = value_of(classified("a", LABELS, share), "auroc")
    for found in (CellResult.from_json(value | {"kind": "multi"}), without_kind(value)):
        assert labels_of(found).shape == (60, 1) and value_of(found, "auroc") == pytest.approx(auroc)
        (one,) = compare([[found, found]], ["auroc"])
        assert (one.difference.mean, one.p) == (0.0, 1.0)


def test_the_kind_of_labels_of_an_older_file_is_told_by_their_shape():
    value = classified("a", LABELS, noisy(LABELS, 0.8, 0)).to_json()
    assert not without_kind(value).is_multi and without_kind(value | {"labels": [[0, 1]] * 60}).is_multi
