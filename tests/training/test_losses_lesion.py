"""Losses for small structures: by hand, against plain implementations and finite differences; exact distances."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from voxdino.core.errors import ConfigError, UsageError
from voxdino.core.labels import LabelSet, Region
from voxdino.training import losses_lesion
from voxdino.training.losses import LOSSES, REGION_LOSSES, choose_loss, dice_binary_cross_entropy
from voxdino.training.losses_lesion import (
    LESION_LOSSES,
    dice_cross_entropy_boundary,
    focal_dice,
    signed_distance,
    squared_distance,
    tversky_cross_entropy,
)

IGNORED = -1
MEMBERS = [(1, 2), (2,), (1,)]
LN2 = math.log(2)
KINDS = [(name, kind) for name in LESION_LOSSES for kind in ("classes", "regions")]


def loss_of(name, kind):
    return partial(LESION_LOSSES[name], ignore_index=IGNORED, members=MEMBERS if kind == "regions" else None)


def example(shape=(5, 7), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, *shape, generator=generator, dtype=dtype, requires_grad=True)
    return logits, torch.randint(-1, 3, (2, *shape), generator=generator)


def row(*labels):
    return torch.tensor([[labels]])


@pytest.mark.parametrize("name, kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 3)], ids=["2d", "3d"])
def test_gradients_agree_with_finite_differences(name, kind, shape):
    logits, labels = example(shape, torch.float64)
    assert torch.autograd.gradcheck(lambda values: loss_of(name, kind)(values, labels), logits)


@pytest.mark.parametrize("name, kind", KINDS)
def test_ignored_voxels_count_nowhere_and_alone_cost_nothing(name, kind):
    logits, labels = example((5, 7))
    loss = loss_of(name, kind)
    other = torch.where((labels == IGNORED).unsqueeze(1), 60.0, logits.detach())
    torch.testing.assert_close(loss(other, labels), loss(logits, labels))
    nothing = loss(logits, torch.full_like(labels, IGNORED))
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("name, kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)], ids=["2d", "3d"])
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(name, kind, shape):
    _, labels = example(shape)
    groups = [labels > 0, labels == 2, labels == 1] if kind == "regions" else [labels == k for k in range(3)]
    right = torch.stack(groups, 1) * 60.0 - 30
    assert loss_of(name, kind)(right, labels).item() < 1e-4
    assert loss_of(name, kind)(-right, labels).item() > 10


@pytest.mark.parametrize("name", LESION_LOSSES)
def test_two_classes_cost_what_their_one_region_costs(name):
    """Softmax over (0, x) is the sigmoid of x."""
    logits, labels = example((4, 6))
    labels = labels.clamp(max=1)
    region = logits[:, :1]
    pair = torch.cat((torch.zeros_like(region), region), dim=1)
    as_region = LESION_LOSSES[name](region, labels, ignore_index=IGNORED, members=[(1,)])
    torch.testing.assert_close(LESION_LOSSES[name](pair, labels, ignore_index=IGNORED), as_region)


def test_tversky_by_hand():
    logits = torch.zeros(1, 2, 1, 4)  # p = 0.5 everywhere
    tversky = partial(tversky_cross_entropy, ignore_index=IGNORED)
    # TP 1, FP 1, FN 1: 1 / 2.  One voxel of four: TP 0.5, FP 1.5, FN 0.5: 0.5 / (0.5 + 0.45 + 0.35)
    assert tversky(logits, row(0, 0, 1, 1)).item() == pytest.approx(LN2 + 0.5, abs=1e-5)
    assert tversky(logits, row(0, 0, 0, 1)).item() == pytest.approx(LN2 + 1 - 0.5 / 1.3, abs=1e-5)
    one = torch.tensor([[[[-9.0, -9.0, 9.0, -9.0]]]])
    two = torch.tensor([[[[-9.0, 9.0, 9.0, -9.0]]]])
    region = partial(tversky, members=[(1,)])
    missed, invented = region(one, row(0, 1, 1, 0)), region(two, row(0, 0, 1, 0))
    assert missed.item() - invented.item() == pytest.approx(0.7 / 1.7 - 0.3 / 1.3, abs=2e-3)


def test_half_and_half_tversky_is_dice(monkeypatch):
    logits, labels = example()
    monkeypatch.setattr(losses_lesion, "FALSE_POSITIVES", 0.5)
    monkeypatch.setattr(losses_lesion, "FALSE_NEGATIVES", 0.5)
    valid = labels != IGNORED
    probs, truth = logits.softmax(1).movedim(1, -1)[valid], F.one_hot(labels[valid], 3)
    dice = 2 * (probs * truth).sum(0) / (probs.sum(0) + truth.sum(0))
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED) + 1 - dice[1:].mean()
    torch.testing.assert_close(tversky_cross_entropy(logits, labels, ignore_index=IGNORED), expected, atol=1e-5, rtol=0)


def test_focal_by_hand_and_against_a_plain_implementation():
    focal = partial(focal_dice, ignore_index=IGNORED)
    assert focal(torch.zeros(1, 2, 1, 4), row(0, 0, 1, 1)).item() == pytest.approx(0.25 * LN2 + 0.5, abs=1e-5)
    logits, labels = example()
    valid = labels != IGNORED
    probs, truth = logits.softmax(1).movedim(1, -1)[valid], F.one_hot(labels[valid], 3)
    true = (probs * truth).sum(1)
    dice = 2 * (probs * truth).sum(0) / (probs.sum(0) + truth.sum(0))
    plain = (-((1 - true) ** 2) * true.log()).mean() + 1 - dice[1:].mean()
    torch.testing.assert_close(focal(logits, labels), plain, atol=1e-5, rtol=0)


def test_boundary_by_hand():
    boundary = partial(dice_cross_entropy_boundary, ignore_index=IGNORED)
    labels = row(0, 0, 1, 1, 0)
    # phi 2 1 -1 -1 1, p - g 0.5 0.5 -0.5 -0.5 0.5: 3 / 5;  Dice 2 / (2.5 + 2)
    expected = LN2 + 1 - 2 / 4.5 + 0.01 * 3 / 5
    assert boundary(torch.zeros(1, 2, 1, 5), labels).item() == pytest.approx(expected, abs=1e-5)
    wide = boundary(torch.zeros(1, 2, 1, 5), labels, spacing=(1.0, 3.0)).item()
    assert wide - expected == pytest.approx(0.01 * 2 * 3 / 5, abs=1e-5)


def test_a_wrong_voxel_costs_more_the_farther_it_lies_away():
    labels = row(1, 1, 0, 0, 0, 0)
    costs = []
    for place in range(2, 6):
        logits = torch.tensor([[[[9.0, 9.0, -9.0, -9.0, -9.0, -9.0]]]])
        logits[..., place] = 9.0
        costs.append(dice_cross_entropy_boundary(logits, labels, ignore_index=IGNORED, members=[(1,)]).item())
    np.testing.assert_allclose(np.diff(costs), 0.01 / 6, rtol=2e-2)


@pytest.mark.parametrize("shape, spacing", [((7, 9), (1.0, 1.0)), ((6, 11), (2.5, 0.7)), ((4, 6, 5), (3.0, 0.8, 1.1))])
@pytest.mark.parametrize("block", [1 << 20, 100])
def test_distances_are_exact(shape, spacing, block, monkeypatch):
    monkeypatch.setattr(losses_lesion, "_BLOCK", block)
    seeds = torch.from_numpy(np.random.default_rng(0).random((3, *shape)) < 0.1)
    for one, found in zip(seeds.numpy(), squared_distance(seeds, spacing), strict=True):
        expected = ndimage.distance_transform_edt(~one, sampling=spacing) ** 2
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert squared_distance(torch.zeros(1, *shape, dtype=torch.bool), spacing).isinf().all()


def test_signed_distance_changes_sign_at_the_boundary_and_knows_none_for_ignored_voxels():
    inside = torch.tensor([[[[False, False, True, True, False]]]])
    assert signed_distance(inside, ~inside).flatten().tolist() == [2, 1, -1, -1, 1]
    unsure = torch.tensor([[[[False, False, False, False, True]]]])  # the last voxel is ignored
    assert signed_distance(inside, ~inside & ~unsure).flatten().tolist()[:4] == [2, 1, -1, -2]
    assert (signed_distance(inside & False, ~inside) == 0).all()
    assert (signed_distance(~inside | inside, inside & False) == 0).all()


def test_half_precision_logits_are_summed_in_single_precision():
    logits, labels = example((32, 32))
    for name, kind in KINDS:
        rough = loss_of(name, kind)(logits.bfloat16(), labels)
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, loss_of(name, kind)(logits, labels), atol=2e-2, rtol=0)


REGION_SET = LabelSet(
    names=("background", "oedema", "core"),
    ids=(0, 3, 7),
    regions=(Region(name="whole", ids=(3, 7)), Region(name="core", ids=(7,))),
    region_ids=(3, 7),
)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_chosen_for_classes_and_for_regions_or_refused(name):
    logits, labels = example()
    classes = REGION_SET.model_copy(update={"regions": (), "region_ids": ()})
    chosen = choose_loss(name, classes, ignore_index=IGNORED)
    torch.testing.assert_close(chosen(logits, labels), LOSSES[name](logits, labels, ignore_index=IGNORED))
    if name in REGION_LOSSES:
        chosen = choose_loss(name, REGION_SET, ignore_index=IGNORED)
        by_hand = REGION_LOSSES[name](logits[:, :2], labels, ignore_index=IGNORED, members=[(1, 2), (2,)])
        torch.testing.assert_close(chosen(logits[:, :2], labels), by_hand)
    else:
        with pytest.raises(ConfigError, match=r"exclusive classes.*loss=dice_ce\|dinomed3d\|tversky_ce\|focal_dice"):
            choose_loss(name, REGION_SET, ignore_index=IGNORED)


def test_the_usual_loss_of_regions_is_what_it_was_and_unknown_names_are_refused():
    assert REGION_LOSSES["dice_ce"] is dice_binary_cross_entropy
    with pytest.raises(UsageError, match=r"unknown loss 'focal_dize'\. Did you mean 'focal_dice'"):
        choose_loss("focal_dize", REGION_SET, ignore_index=IGNORED)


def test_dinomed3d_of_regions_weighs_as_it_does_for_classes():
    labels, logits = row(1, 1, 0, -1), torch.zeros(1, 2, 1, 4)
    loss = choose_loss("dinomed3d", REGION_SET, ignore_index=IGNORED)(logits, labels)
    # region "whole": overlap 1, predicted 1.5, present 2; "core": absent, predicted 1.5 < 10 voxels: Dice 1
    assert loss.item() == pytest.approx(0.2 * LN2 + 0.8 * (1 - (2 / 3.5 + 1) / 2), abs=1e-5)
