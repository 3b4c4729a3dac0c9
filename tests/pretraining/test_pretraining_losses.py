"""Losses of self-distillation: by hand on small numbers, laws of Sinkhorn-Knopp, and what they refuse to count."""

import math

import pytest
import torch

from voxdino.pretraining import losses as losses_module
from voxdino.pretraining.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp


def logits(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_sinkhorn(scores, temperature, num_iterations):
    """As in the papers, in float64, without any care for large numbers."""
    shares = (scores.double() / temperature).exp().T  # (K, N)
    for _ in range(num_iterations):
        shares = shares / shares.sum(dim=1, keepdim=True) / len(shares)
        shares = shares / shares.sum(dim=0, keepdim=True) / shares.shape[1]
    return (shares * shares.shape[1]).T.float()


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 7])
def test_sinkhorn_does_what_the_papers_write(num_iterations):
    scores = logits(7, 5)
    ours = sinkhorn_knopp(scores, temperature=0.07, num_iterations=num_iterations)
    torch.testing.assert_close(ours, plain_sinkhorn(scores, 0.07, num_iterations), atol=1e-6, rtol=1e-5)


@pytest.fixture
def three_rows_at_a_time(monkeypatch):
    """As of so many prototypes that few rows fit the cache; the last part is a shorter one."""
    monkeypatch.setattr(losses_module, "_CACHED_VALUES", 3 * 8)
    assert [len(part) for part in losses_module._some_rows(logits(7, 8))] == [3, 3, 1]


@pytest.mark.usefixtures("three_rows_at_a_time")
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_sinkhorn_some_rows_at_a_time_is_that_of_all(num_iterations):
    scores = logits(7, 8)
    ours = sinkhorn_knopp(scores, temperature=0.07, num_iterations=num_iterations)
    torch.testing.assert_close(ours, plain_sinkhorn(scores, 0.07, num_iterations), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("three_rows_at_a_time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_some_rows_at_a_time_is_that_of_all(dtype):
    given, wanted, weights = logits(7, 8).to(dtype).requires_grad_(), logits(7, 8, seed=1).softmax(1), torch.rand(7)
    ours = ibot_loss(given, wanted.to(dtype), weights=weights, num_images=4)
    (gradient,) = torch.autograd.grad(ours, given)
    plain = given.detach().float().requires_grad_()
    entropies = -(wanted.to(dtype).float() * (plain / 0.1).log_softmax(1)).sum(1)
    torch.testing.assert_close(ours, (entropies * weights).sum() / 4)
    (expected,) = torch.autograd.grad((entropies * weights).sum() / 4, plain)
    torch.testing.assert_close(gradient, expected.to(dtype), atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


def test_targets_are_probabilities_and_prototypes_are_used_evenly():
    targets = sinkhorn_knopp(logits(40, 6), temperature=0.5, num_iterations=30)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((6,), 40 / 6), rtol=1e-3, atol=0)


def test_a_prototype_that_all_rows_prefer_is_shared_out():
    scores = logits(8, 4)
    scores[:, 2] += 3.0
    torch.testing.assert_close(
        sinkhorn_knopp(scores, temperature=0.1), sinkhorn_knopp(logits(8, 4), temperature=0.1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_no_logit_is_too_large_or_too_small_for_sinkhorn(scale):
    targets = sinkhorn_knopp(logits(9, 5, scale=scale), temperature=0.04)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(9))


def test_no_rows_at_all_are_no_fault():
    assert sinkhorn_knopp(logits(0, 5), temperature=0.07).shape == (0, 5)
    nothing = logits(0, 5).requires_grad_()
    loss = ibot_loss(nothing, logits(0, 5), weights=torch.ones(0), num_images=4)
    loss.backward()
    assert loss == 0 and nothing.grad.shape == (0, 5)


def test_not_a_number_is_not_hidden():
    scores = logits(4, 3)
    scores[1, 1] = float("nan")
    assert sinkhorn_knopp(scores, temperature=0.1).isnan().any()
    assert dino_loss(scores[None], torch.full((1, 4, 3), 1 / 3)).isnan()


def test_targets_take_no_gradient():
    assert not sinkhorn_knopp(logits(4, 3).requires_grad_(), temperature=0.1).requires_grad


def test_dino_by_hand():
    """One image, two prototypes: an undecided student loses log 2 against any teacher."""
    student = torch.tensor([[[0.0, 0.0]], [[0.1, 0.0]]])  # (2 crops, 1, 2)
    teacher = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    for_first = math.log(1 + math.exp(-1))  # of the second crop, temperature 0.1
    for_second = math.log(1 + math.exp(1))
    expected = (2 * math.log(2) + for_first + for_second) / 4
    assert dino_loss(student, teacher).item() == pytest.approx(expected)
    crossed = (math.log(2) + for_first) / 2
    assert dino_loss(student, teacher, ignore_diagonal=True).item() == pytest.approx(crossed)


def test_dino_is_the_mean_over_pairs_of_crops():
    student, teacher = logits(5, 3, 4), logits(2, 3, 4, seed=1).softmax(dim=-1)
    pairs = [dino_loss(student[s : s + 1], teacher[t : t + 1]) for s in range(5) for t in range(2)]
    torch.testing.assert_close(dino_loss(student, teacher), torch.stack(pairs).mean())
    crossed = [pair for place, pair in enumerate(pairs) if place not in (0, 3)]
    torch.testing.assert_close(dino_loss(student, teacher, ignore_diagonal=True), torch.stack(crossed).mean())


def test_the_teacher_probabilities_are_left_as_they_were():
    teacher = logits(2, 3, 4).softmax(dim=-1)
    before = teacher.clone()
    dino_loss(logits(2, 3, 4), teacher, ignore_diagonal=True)
    assert torch.equal(teacher, before)


def test_every_masked_image_counts_the_same_in_ibot():
    student, teacher = logits(5, 4), logits(5, 4, seed=1).softmax(dim=-1)
    each = torch.stack([dino_loss(student[None, i : i + 1], teacher[None, i : i + 1]) for i in range(5)])
    weights = torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25])  # one patch of the first image, four of the second
    expected = (each[0] + each[1:].mean()) / 3  # the third has no mask
    torch.testing.assert_close(ibot_loss(student, teacher, weights=weights, num_images=3), expected)


def test_koleo_by_hand():
    """Neighbours at right angles are sqrt(2) apart, whatever their lengths."""
    features = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0]])
    assert koleo_loss(features).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)


def test_koleo_pushes_neighbours_apart_and_sees_no_neighbour_of_one():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.2]]).requires_grad_()
    koleo_loss(features).backward()
    stepped = features.detach() - 0.1 * features.grad
    assert koleo_loss(stepped) < koleo_loss(features)
    alone = torch.ones(1, 4, requires_grad=True)
    koleo_loss(alone).backward()
    assert koleo_loss(alone) == 0 and not alone.grad.any()


def test_koleo_of_collapsed_features_is_large_and_finite():
    features = torch.ones(4, 8, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert 10 < loss < 30 and torch.isfinite(features.grad).all()


def test_gram_by_hand():
    """Two patches at right angles for the student, opposed for the teacher: 0 against -1, in half of the four pairs."""
    student = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [-5.0, 0.0]]])
    assert gram_loss(student, teacher).item() == pytest.approx(0.5)
    for setting in ("remove_negative", "remove_teacher_negative"):
        assert gram_loss(student, teacher, **{setting: True}).item() == 0
    assert gram_loss(teacher, student, remove_teacher_negative=True).item() == pytest.approx(0.5)


def test_gram_does_not_see_a_common_rotation_of_features():
    student = logits(2, 6, 4)
    rotation = torch.linalg.qr(logits(4, 4, seed=1)).Q
    assert gram_loss(student, 3 * student @ rotation).item() == pytest.approx(0, abs=1e-10)


def test_gram_of_a_batch_compares_patches_of_different_images():
    student, teacher = logits(2, 3, 4), logits(2, 3, 4, seed=1)
    as_one = gram_loss(student.view(1, 6, 4), teacher.view(1, 6, 4))
    torch.testing.assert_close(gram_loss(student, teacher, level="batch"), as_one)
    torch.testing.assert_close(gram_loss(student[:1], teacher[:1], level="batch"), gram_loss(student[:1], teacher[:1]))


LOSSES = {
    "dino": lambda x: dino_loss(x.view(2, 4, 6), x.detach().view(2, 4, 6).flip(0).float().softmax(dim=-1)),
    "ibot": lambda x: ibot_loss(x, x.detach().flip(0).float().softmax(dim=-1), weights=torch.ones(8), num_images=2),
    "koleo": lambda x: koleo_loss(x),
    "gram": lambda x: gram_loss(x.view(2, 4, 6), x.detach().view(2, 4, 6).flip(0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compute_in_float32_also_of_halves_and_under_autocast(name):
    loss = LOSSES[name]
    halves = logits(8, 6).bfloat16()
    exact = loss(halves.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(halves.float()), exact)
        rounded = loss(halves)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    fixed = logits(8, 6, seed=3)  # the other side stays there while the point moves
    probabilities = fixed.flip(0).softmax(dim=-1)
    losses = {
        "dino": lambda x: dino_loss(x.view(2, 4, 6), probabilities.view(2, 4, 6), student_temperature=1.0),
        "ibot": lambda x: ibot_loss(x, probabilities, weights=torch.ones(8), num_images=2, student_temperature=1.0),
        "koleo": koleo_loss,
        "gram": lambda x: gram_loss(x.view(2, 4, 6), fixed.view(2, 4, 6).flip(0)),
    }
    loss, point = losses[name], fixed.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    direction = logits(8, 6, seed=4)
    step = 5e-4 * direction  # no neighbour of KoLeo changes on so short a way
    slope = (loss(fixed + step) - loss(fixed - step)) / 1e-3
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-3)
