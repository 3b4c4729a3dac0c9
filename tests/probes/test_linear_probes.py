"""Linear probes: the convex fit in three kinds, its penalty, its calibration."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from voxdino.core.errors import DatasetError
from voxdino.models.heads.objectives import OBJECTIVES
from voxdino.probes.calibration import fit_temperature
from voxdino.probes.class_tokens import accuracy
from voxdino.probes.fitting import fit_logistic, standardised
from voxdino.probes.linear import fit_linear_probe

torch.set_num_threads(1)


def ladder(number, *, seed=0, noise=0.5, width=5):
    """Features along a direction, and how far along they are: classes 0 to 3."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, 4, number)
    features = rng.normal(size=(number, width)) * noise
    features[:, 0] += place
    return torch.from_numpy(features).float(), torch.from_numpy(place.astype(np.int64))


def test_the_fit_of_several_labels_is_that_of_scikit_learn_label_by_label():
    features, classes = ladder(80)
    labels = torch.stack((classes > 0, classes % 2 == 0), dim=1).long()
    x = features.double()
    strength = 0.05
    found = fit_logistic(x, labels, 2, strength, kind="multi")
    for column in range(2):  # the loss is the mean over 80 x 2 answers
        one = LogisticRegression(C=1 / (strength * 160), tol=1e-10, max_iter=1000).fit(x.numpy(), labels[:, column])
        np.testing.assert_allclose(found[column, :-1], one.coef_[0], atol=1e-5)
        np.testing.assert_allclose(found[column, -1], one.intercept_[0], atol=1e-5)


def test_ordered_classes_share_one_direction_and_their_probabilities_are_ordered():
    train, held, test = (ladder(n, seed=seed) for n, seed in ((200, 0), (60, 1), (100, 2)))
    probe = fit_linear_probe(*train, *held, kind="ordinal")
    assert torch.equal(probe.weight[0, :-1], probe.weight[2, :-1])
    assert bool((probe.weight[:-1, -1] > probe.weight[1:, -1]).all())
    chances = probe.probabilities(test[0])
    assert chances.shape == (100, 4) and bool((chances >= 0).all())
    torch.testing.assert_close(chances.sum(1), torch.ones(100).double())
    expected = (chances * torch.arange(4.0)).sum(1)
    assert float((expected - test[1]).abs().mean()) < 0.5
    assert accuracy(chances, test[1]) > 0.6


def test_the_strength_is_that_of_the_smallest_validation_loss_and_the_result_is_always_the_same():
    train, held = ladder(60), ladder(40, seed=1)
    first, second = (fit_linear_probe(*train, *held) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert min(first.held_out.values()) == first.held_out[first.strength]
    x, mean, sd = standardised(train[0].double())
    weights = fit_logistic(x, train[1], 4, first.strength)
    logits = (held[0].double() - mean) / sd @ weights[:, :-1].T + weights[:, -1]
    loss = float(F.cross_entropy(logits, held[1]))
    assert loss == pytest.approx(first.held_out[first.strength], abs=1e-6)


def test_units_offsets_and_constant_channels_do_not_matter():
    train, held = ladder(80), ladder(40, seed=1)
    scale, shift = torch.tensor([1.0, 100.0, 0.01, 5.0, 1.0]), torch.tensor([0.0, 7.0, -3.0, 1.0, 0.0])

    def moved(part):
        return torch.cat((part[0] * scale + shift, torch.full((len(part[0]), 1), 0.3)), dim=1), part[1]

    expected = fit_linear_probe(*train, *held).probabilities(held[0])
    found = fit_linear_probe(*moved(train), *moved(held)).probabilities(moved(held)[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_class_that_training_never_saw_has_a_probability_all_the_same():
    features, labels = ladder(60)
    known = labels < 3
    probe = fit_linear_probe(features[known], labels[known], features, labels)
    assert probe.num_classes == 4 and probe.probabilities(features).shape == (60, 4)


@pytest.mark.parametrize("labels, words", [(torch.ones(9).long(), "9 training examples of 1 classes"), (None, "1 tr")])
def test_too_little_to_learn_from_is_refused(labels, words):
    features = torch.rand(9, 3)
    y = torch.arange(1) if labels is None else labels
    with pytest.raises(DatasetError, match=words):
        fit_linear_probe(features[: len(y)], y, features[: len(y)], y)


@pytest.mark.parametrize("kind", ["single", "multi", "ordinal"])
def test_the_temperature_undoes_a_scale_of_the_logits(kind):
    logits = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
    chances = OBJECTIVES[kind].probabilities(logits.sort(1, descending=True).values if kind == "ordinal" else logits)
    logits = logits.sort(1, descending=True).values if kind == "ordinal" else logits
    draw = torch.rand(4000, 1, generator=torch.Generator().manual_seed(1))
    labels = (draw < chances).long() if kind == "multi" else (draw > chances.cumsum(1)).sum(1)
    plain = fit_temperature(logits, labels, kind)
    assert plain == pytest.approx(1, abs=0.15)
    assert fit_temperature(5 * logits, labels, kind) == pytest.approx(5 * plain, rel=1e-3)


def test_calibration_keeps_the_order_of_the_classes_and_lowers_the_loss():
    train, held = ladder(60, noise=2.0), ladder(100, seed=1, noise=2.0)
    plain, calibrated = (fit_linear_probe(*train, *held, strengths=[1e-4], calibrate=yes) for yes in (False, True))
    before, after = (probe.probabilities(held[0]) for probe in (plain, calibrated))
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert float(F.nll_loss(after.log(), held[1])) < float(F.nll_loss(before.log(), held[1]))


def test_separable_logits_have_a_bounded_temperature():
    logits, labels = torch.tensor([[4.0, -4.0], [-4.0, 4.0]]), torch.tensor([0, 1])
    assert 0.01 <= fit_temperature(logits, labels) < 1
    assert 1 < fit_temperature(-logits, labels) <= 100


def test_more_features_than_examples_give_the_minimum_of_scikit_learn():
    features, labels = ladder(30, width=90)
    x, strength = features.double(), 0.01
    first = fit_logistic(x, labels, 4, 0.1)
    found = fit_logistic(x, labels, 4, strength, start=first)
    known = LogisticRegression(C=1 / (strength * 30), tol=1e-10, max_iter=5000).fit(x.numpy(), labels)
    np.testing.assert_allclose(found[:, :-1], known.coef_, atol=1e-5)
