"""By lesion: a small one is drawn as often as a large one, in the case and in a pool of cached records."""

import numpy as np
import pytest

from voxdino.data.sampling import CaseExtent, PoolSampler, Quotas, Sampler, records_of_lesions
from voxdino.data.slabs import CachedCase, SlabSampler, SlabViews, slices_of_lesions
from voxdino.preparation.case_record import Lesion

SHAPE = (11, 60, 70)
BOXES = (((2, 3), (50, 51), (60, 61)), ((0, 9), (5, 30), (5, 30)), ((8, 10), (40, 42), (3, 6)))  # 1, 5625, 12 voxels


def lesion(box):
    every = np.stack(np.meshgrid(*(np.arange(*ends) for ends in box), indexing="ij"), -1).reshape(-1, 3)
    return Lesion(len(every), box, every[np.linspace(0, len(every) - 1, min(16, len(every))).astype(int)])


def case(name="a", boxes=BOXES, rare=((6, 7), (20, 22), (60, 62))):
    """Class 1 with a speck, a large and a small lesion; class 2 with one small lesion."""
    of_class = {1: [lesion(box) for box in boxes], 2: [lesion(rare)]}
    large = np.random.default_rng(0).integers([0, 5, 5], [9, 30, 30], (1990, 3))  # what 2000 voxels of class 1 are
    slices = tuple(sorted({z for lesions in of_class.values() for one in lesions for z in range(*one.box[0])}))
    return CaseExtent(name, SHAPE, {1: large, 2: of_class[2][0].voxels}, slices, of_class)


def sampler(by, cases=None, crop=(16, 20), slab=1, foreground=1.0):
    return Sampler(cases or [case()], crop, slab, Quotas(foreground=foreground, empty=0.0, by=by), seed=0)


def held_by(draw, one):
    return all(start < last and stop > first for (start, stop), (first, last) in zip(draw.box, one.box, strict=True))


@pytest.mark.parametrize("slab", [1, 4])
def test_every_lesion_is_drawn_as_often_as_any_other_of_its_class(slab):
    draws = [sampler("lesion", slab=slab).draw(1, index) for index in range(600)]
    counts = [sum(held_by(draw, one) for draw in draws) for one in case().lesions[1]]
    assert all(80 < count < 140 for count in counts)  # a third of the half that class 1 has
    assert 250 < sum(held_by(draw, case().lesions[2][0]) for draw in draws) < 350
    by_voxel = [sampler("voxel", slab=slab).draw(1, index) for index in range(600)]
    assert sum(held_by(draw, case().lesions[1][0]) for draw in by_voxel) == 0
    assert sum(held_by(draw, case().lesions[1][1]) for draw in by_voxel) > 250


def test_draws_by_lesion_repeat_themselves_and_keep_their_share():
    wanted = [(epoch, index) for epoch in (1, 2) for index in range(40)]
    first, second = sampler("lesion"), sampler("lesion")
    assert [first.draw(*one) for one in wanted] == [second.draw(*one) for one in reversed(wanted)][::-1]
    none = CaseExtent("a", SHAPE, {}, ())
    assert {sampler("lesion", [none]).draw(1, index).box[0][0] for index in range(200)} == set(range(SHAPE[0]))


def test_lesions_change_nothing_when_drawing_by_voxel():
    with_lesions, known = sampler("voxel"), case()
    without = sampler("voxel", [CaseExtent("a", SHAPE, known.locations, known.foreground_slices)])
    for index in range(30):
        assert with_lesions.draw(1, index) == without.draw(1, index)
        assert with_lesions.view("a", 8, index) == without.view("a", 8, index)


def test_views_of_a_slice_look_at_its_lesions_evenly_and_at_locations_where_none_is_known():
    draws = sampler("lesion", crop=(10, 10))
    small = [held_by(draws.view("a", 8, epoch), case().lesions[1][2]) for epoch in range(200)]
    assert 70 < sum(small) < 130  # slice 8: the small lesion and the end of the large one
    one = case(boxes=BOXES[1:2])
    far = Lesion(5625, BOXES[1], one.lesions[1][0].voxels[:1])  # its only known voxel lies in slice 0
    known = CaseExtent("a", SHAPE, one.locations, one.foreground_slices, {1: [far]})
    for epoch in range(30):
        _, (top, bottom), (left, right) = sampler("lesion", [known], crop=(10, 10)).view("a", 5, epoch).box
        assert top < 30 and bottom > 5 and left < 30 and right > 5


def test_records_of_lesions_are_those_whose_crop_meets_them():
    cases = [case("a"), case("b", boxes=BOXES[:1])]
    views = Sampler(cases, (16, 20), 1, Quotas(foreground=0.5), seed=0)
    draws = [views.view(name, depth, view) for view in (0, 1) for name in "ba" for depth in range(SHAPE[0])]
    found = records_of_lesions(cases, draws)
    for label, of_class in zip((1, 2), found, strict=True):
        expected = [
            [place for place, draw in enumerate(draws) if draw.case_id == one.case_id and held_by(draw, component)]
            for one in cases
            for component in one.lesions[label]
        ]
        assert [places.tolist() for places in of_class] == [places for places in expected if places]
    assert records_of_lesions(cases, []) == []


def test_a_pool_gives_every_lesion_its_turn_and_keeps_the_share_of_foreground():
    held = np.arange(100) < 40
    lesions = [[np.array([0]), np.arange(1, 38), np.array([38, 39])], [np.array([38])]]
    pool = PoolSampler(held.tolist(), Quotas(foreground=0.5, empty=0.1, by="lesion"), 0, lesions)
    taken = [pool.draw(number) for number in range(2000)]
    assert taken == [pool.draw(number) for number in range(2000)]
    assert np.mean([held[place] for place in taken]) == pytest.approx(0.5 + 0.4 * 0.4, abs=0.02)
    every = np.bincount(taken, minlength=100)
    assert 160 < every[0] < 190  # a sixth of 1000, and what is drawn anywhere
    assert 565 < every[38] < 610  # the half of class 2, half a sixth, and anywhere
    assert every[1:38].sum() < 500
    for start in range(0, 2000, 10):
        assert sum(held[place] for place in taken[start : start + 10]) >= 5


def test_a_pool_without_lesions_falls_back_to_its_records():
    quotas = Quotas(foreground=0.5, empty=0.5)
    by_lesion = quotas.model_copy(update={"by": "lesion"})
    plain = PoolSampler([True, False, True], quotas, 0)
    for lesions in ((), [[]]):
        pool = PoolSampler([True, False, True], by_lesion, 0, lesions)
        assert [pool.draw(n) for n in range(40)] == [plain.draw(n) for n in range(40)]


def test_slabs_hold_each_lesion_as_often_as_any_other():
    views = SlabViews([case()], (70, 80), Quotas(by="lesion"), seed=0)
    slices = slices_of_lesions(case(), views.draw("a", 0, 0))
    assert slices == ((2,), tuple(range(9)), (8, 9), (6,))
    cached = CachedCase(0, 0, 11, tuple(range(10)), slices)
    draws = SlabSampler([cached], 2, Quotas(foreground=1.0, by="lesion"), seed=0)
    held = [{index for _, index in draws.draw(number)[0]} for number in range(400)]
    for lesion in slices:
        assert sum(bool(set(lesion) & slab) for slab in held) > 85  # a quarter, and by chance
    plain = SlabSampler([CachedCase(0, 0, 11, tuple(range(10)))], 2, Quotas(foreground=1.0), seed=0)
    assert sum(2 in {index for _, index in plain.draw(number)[0]} for number in range(400)) < 110
    assert sum(2 in slab for slab in held) > 110


def test_slabs_look_for_lesions_where_the_view_lies_in_plane():
    views = SlabViews([case()], (12, 12), Quotas(foreground=1.0, by="lesion"), seed=0)
    shown = [slices_of_lesions(case(), views.draw("a", 0, view)) for view in range(80)]
    assert all(shown) and sum((2,) in lesions for lesions in shown) > 5  # the speck: a third of half of them
    by_voxel = SlabViews([case()], (12, 12), Quotas(foreground=1.0), seed=0)
    plain = [slices_of_lesions(case(), by_voxel.draw("a", 0, view)) for view in range(80)]
    assert not any((2,) in lesions for lesions in plain)


def test_the_store_knows_the_lesions_of_a_case(store):
    extent = store.extent("case_0")
    (block,) = extent.lesions[1]
    assert block.num_voxels == 18 and len(block.voxels) == 16
    assert all(any((extent.locations[1] == voxel).all(axis=1)) for voxel in block.voxels)
    assert tuple(range(*block.box[0])) == extent.foreground_slices
