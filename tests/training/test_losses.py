"""Losses: checked by hand, against a plain implementation, and where everything is ignored."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from voxdino.training.losses import LOSSES, dice_binary_cross_entropy, dice_cross_entropy, dinomed3d

IGNORED = -1
REGIONS = partial(dice_binary_cross_entropy, members=[(1, 2), (2,), (1,)], ignore_index=IGNORED)
EVERY = {**{name: partial(loss, ignore_index=IGNORED) for name, loss in LOSSES.items()}, "regions": REGIONS}


def example(shape=(5, 7), num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, num_classes, *shape, generator=generator, requires_grad=True)
    return logits, torch.randint(0, num_classes, (2, *shape), generator=generator)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)], ids=["2d", "3d"])
def test_every_loss_is_finite_positive_and_reaches_every_logit(name, shape):
    logits, labels = example(shape)
    loss = EVERY[name](logits, labels)
    loss.backward()
    assert loss.ndim == 0 and 0 < loss.item() < 10
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_ignored_voxels_costs_nothing_and_moves_nothing(name):
    logits, labels = example()
    loss = EVERY[name](logits, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_what_stands_at_ignored_voxels_does_not_matter(name):
    logits, labels = example()
    labels[:, :2] = IGNORED
    other = logits.detach().clone()
    other[:, :, :2] = 50.0
    torch.testing.assert_close(EVERY[name](logits, labels), EVERY[name](other, labels))


@pytest.mark.parametrize("name", EVERY)
def test_a_sure_and_right_prediction_costs_almost_nothing_a_sure_and_wrong_one_much(name):
    _, labels = example()
    if name == "regions":
        right = torch.stack([labels > 0, labels == 2, labels == 1], 1) * 60.0 - 30
    else:
        right = F.one_hot(labels, 3).movedim(-1, 1) * 60.0
    assert EVERY[name](right, labels).item() < 1e-3
    assert EVERY[name](-right, labels).item() > 10


def test_dice_cross_entropy_equals_a_plain_implementation():
    logits, labels = example()
    labels[0, 0, 0] = IGNORED
    valid = labels != IGNORED
    probs = logits.softmax(1).movedim(1, -1)[valid]
    onehot = F.one_hot(labels[valid], 3).float()
    dice = (2 * (probs * onehot).sum(0) + 1e-5) / (probs.sum(0) + onehot.sum(0) + 1e-5)
    plain = F.cross_entropy(logits, labels, ignore_index=IGNORED) + 1 - dice[1:].mean()
    torch.testing.assert_close(dice_cross_entropy(logits, labels, ignore_index=IGNORED), plain)


def test_dice_counts_only_classes_that_the_batch_holds():
    logits = torch.zeros(1, 3, 1, 4)
    labels = torch.tensor([[[0, 0, 1, 1]]])  # class 2 is absent
    # cross-entropy ln 3; class 1: overlap 2/3, predicted 4/3, present 2
    expected = torch.log(torch.tensor(3.0)) + 1 - (4 / 3) / (10 / 3)
    torch.testing.assert_close(dice_cross_entropy(logits, labels, ignore_index=IGNORED), expected, atol=1e-5, rtol=0)


def test_dinomed3d_by_hand():
    logits = torch.zeros(1, 3, 1, 4)
    labels = torch.tensor([[[0, 0, 1, 1]]])  # class 2 is absent; 4 / 3 voxels of it are claimed
    # cross-entropy ln 3; class 1: overlap 2/3, predicted 4/3, present 2; class 2 counts 1
    expected = 0.2 * torch.log(torch.tensor(3.0)) + 0.8 * (1 - ((4 / 3) / (10 / 3) + 1) / 2)
    torch.testing.assert_close(dinomed3d(logits, labels, ignore_index=IGNORED), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_voxels, dice", [(9, 1.0), (11, 0.0)])
def test_dinomed3d_counts_an_absent_class_as_found_below_ten_voxels_of_it(num_voxels, dice):
    labels = torch.zeros(1, 1, 20, dtype=torch.int64)
    claimed = torch.arange(20) < num_voxels
    logits = 60.0 * torch.stack((~claimed, claimed))[None, :, None].float()
    cross_entropy = 60.0 * num_voxels / 20
    expected = torch.tensor(0.2 * cross_entropy + 0.8 * (1 - dice))
    torch.testing.assert_close(dinomed3d(logits, labels, ignore_index=IGNORED), expected, atol=1e-4, rtol=0)


def test_a_voxel_may_belong_to_two_regions():
    labels = torch.tensor([[[2]]])
    both, one = torch.tensor([[[[9.0]], [[9.0]], [[-9.0]]]]), torch.tensor([[[[9.0]], [[-9.0]], [[-9.0]]]])
    assert REGIONS(both, labels) < 0.01 < REGIONS(one, labels)


def test_half_precision_logits_are_summed_in_single_precision():
    logits, labels = example((64, 64))
    exact = dice_cross_entropy(logits, labels, ignore_index=IGNORED)
    rough = dice_cross_entropy(logits.bfloat16(), labels, ignore_index=IGNORED)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=5e-3, rtol=0)
