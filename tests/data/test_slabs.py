"""Slabs of cached slices: whole cases in order, seeded draws, features that move with their voxels."""

import numpy as np
import pytest
import torch

from voxdino.data.augment import AugmentConfig
from voxdino.data.features import FeatureBatch
from voxdino.data.sampling import CaseExtent, Quotas
from voxdino.data.slabs import CachedCase, SlabSampler, SlabViews, augment_slabs, slab_places, whole_cases
from voxdino.data.store import IGNORED
from voxdino.models.features import Features

CASES = [CachedCase(0, 0, 9, (6, 7)), CachedCase(0, 9, 4, ()), CachedCase(1, 0, 9, (6, 7))]
STILL = AugmentConfig(
    spatial=0.0, gamma=0.0, brightness=0.0, contrast=0.0, noise=0.0, blur=0.0, low_resolution=0.0, flips="none"
)


def extent(name, shape=(9, 20, 14)):
    locations = {1: np.array([[6, 18, 12], [7, 17, 11]])}
    return CaseExtent(name, shape, locations, (6, 7))


def batch(height=12, width=8, slab=3):
    """Features at the resolution of the voxels, so that they can be compared with them."""
    torch.manual_seed(0)
    image = torch.rand(2, 1, slab, height, width).repeat_interleave(4, 3).repeat_interleave(4, 4)
    label = (image[:, 0] > 0.5).long()
    slices = image.transpose(1, 2).flatten(0, 1)  # (B * D, 1, H, W)
    return FeatureBatch(Features((slices,), slices.mean((2, 3)), (1, 1)), label, image, ("a", "b"))


def test_the_slices_of_a_case_stay_together_and_in_order():
    slices = whole_cases([extent("b"), extent("a", (3, 20, 14)), extent("c")], seed=0)
    assert sorted(slices) == [("a", d) for d in range(3)] + [(n, d) for n in "bc" for d in range(9)]
    names = list(dict.fromkeys(name for name, _ in slices))
    assert slices == [(name, depth) for name in names for depth in range(3 if name == "a" else 9)]
    assert any(
        whole_cases([extent(n) for n in "abcdef"], seed) != whole_cases([extent(n) for n in "abcdef"], 0)
        for seed in (1, 2)
    )


def test_all_slices_of_a_view_lie_in_one_place():
    views = SlabViews([extent("a"), extent("b")], (8, 8), Quotas(), seed=0)
    places = {views.draw("a", depth, 2).box[1:] for depth in range(9)}
    assert len(places) == 1
    assert len({views.draw("a", 0, view).box[1:] for view in range(8)}) > 3
    assert [views.draw("a", depth, 1).box[0] for depth in (0, 8)] == [(0, 1), (8, 9)]


def test_the_plain_view_of_a_small_slice_is_its_middle():
    views = SlabViews([extent("a", (9, 5, 6))], (8, 8), Quotas(), seed=0)
    assert views.draw("a", 0, 0).box[1:] == ((-1, 7), (-1, 7))


def test_draws_depend_on_nothing_but_seed_and_number():
    first, again = (SlabSampler(CASES, 4, Quotas(), seed=5) for _ in range(2))
    drawn = [first.draw(number) for number in range(60)]
    assert drawn == [again.draw(number) for number in reversed(range(60))][::-1]
    assert drawn != [SlabSampler(CASES, 4, Quotas(), seed=6).draw(number) for number in range(60)]


def test_slabs_are_consecutive_and_inside_their_case():
    sampler = SlabSampler(CASES, 4, Quotas(), seed=5)
    for number in range(60):
        places, inside = sampler.draw(number)
        assert all(inside) and len({view for view, _ in places}) == 1
        indices = [index for _, index in places]
        assert indices == list(range(indices[0], indices[0] + 4))
        assert indices[-1] < 9 or (indices[0] >= 9 and places[0][0] == 0)


def test_every_case_comes_once_a_round_and_the_quota_meets_foreground():
    sampler = SlabSampler(CASES, 2, Quotas(foreground=1.0, empty=0.0), seed=5)
    drawn = [sampler.draw(number)[0] for number in range(90)]
    of_second = [places for places in drawn if places[0][0] == 0 and places[0][1] >= 9]
    assert len(of_second) == 30
    others = [places for places in drawn if places not in of_second]
    assert all({index for _, index in places} & {6, 7} for places in others)


def test_a_case_shorter_than_the_slab_is_repeated_at_its_ends_and_marked():
    places, inside = slab_places(CASES[1], -1, 6)
    assert [index for _, index in places] == [9, 9, 10, 11, 12, 12]
    assert inside == [False, True, True, True, True, False]
    assert sum(SlabSampler([CASES[1]], 6, Quotas(), seed=0).draw(0)[1]) == 4


def test_no_augmentation_changes_nothing():
    plain = batch()
    same = augment_slabs(plain, seeds=(1, 2), spacing=(1.0, 1.0, 1.0), config=STILL)
    assert torch.equal(same.image, plain.image) and torch.equal(same.label, plain.label)
    torch.testing.assert_close(same.features.maps[0], plain.features.maps[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tilt", [0.0, 10.0])
@pytest.mark.parametrize("with_image", [True, False])
def test_features_voxels_and_labels_move_together(with_image, tilt):
    plain = batch(slab=9)
    moving = STILL.model_copy(update={"spatial": 1.0, "flips": "both", "tilt_degrees": tilt})
    given = plain if with_image else FeatureBatch(plain.features, plain.label, None, plain.case_ids)
    moved = augment_slabs(given, seeds=(3, 4), spacing=(1.0, 1.0, 2.0), config=moving)
    assert not torch.equal(moved.label, plain.label)
    features = moved.features.maps[0].unflatten(0, (2, 9)).transpose(1, 2)  # (B, 1, D, H, W)
    known = moved.label != IGNORED
    agree = (features[:, 0] > 0.5) == (moved.label == 1)
    assert agree[known].float().mean() > (0.85 if tilt else 0.93)  # between random slices nearest and linear differ
    if with_image:
        inside = known.unsqueeze(1)
        assert (moved.image - features).abs()[inside].mean() < (0.06 if tilt else 0.02)  # its edge blends with padding
    assert torch.equal(plain.label, batch(slab=9).label)  # the given batch is left alone


def test_a_sample_is_changed_alike_whatever_lies_beside_it():
    plain, moving = batch(), AugmentConfig().for_dimensions(2)
    both = augment_slabs(plain, seeds=(3, 4), spacing=(1.0, 1.0, 1.0), config=moving)
    maps = tuple(one[3:] for one in plain.features.maps)
    second = FeatureBatch(
        Features(maps, plain.features.cls_token[3:], (1, 1)), plain.label[1:], plain.image[1:], ("b",)
    )
    alone = augment_slabs(second, seeds=(4,), spacing=(1.0, 1.0, 1.0), config=moving)
    torch.testing.assert_close(alone.image[0], both.image[1])
    assert torch.equal(alone.label[0], both.label[1])
    torch.testing.assert_close(alone.features.maps[0], both.features.maps[0][3:])
