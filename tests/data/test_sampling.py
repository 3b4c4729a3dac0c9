"""Draws are pure functions of (seed, epoch, index), keep their quotas, and stay inside the case."""

import itertools

import numpy as np
import pytest

from voxdino.data.sampling import CaseExtent, PoolSampler, Quotas, Sampler, choose_slices


def case(name, shape=(11, 30, 41), organ=(4, 7)):
    """A case with class 1 in the slices organ[0]..organ[1] and a rare class 2 in one of them."""
    rng = np.random.default_rng(len(name))
    common = np.stack([rng.integers(*organ, 500), rng.integers(5, 25, 500), rng.integers(9, 33, 500)], 1)
    return CaseExtent(name, shape, {1: common, 2: np.array([[organ[0], 20, 30]])}, tuple(range(*organ)))


EMPTY = CaseExtent("nothing", (6, 30, 41), {1: np.zeros((0, 3), dtype=np.int64)}, ())


def sampler(cases=None, crop=(16, 20), slab=1, seed=0, **quotas):
    return Sampler(cases or [case("a"), case("bb"), case("ccc"), EMPTY], crop, slab, Quotas(**quotas), seed)


def test_the_same_seed_epoch_and_index_draw_the_same_sample_in_any_order():
    first, second = sampler(), sampler(list(reversed(list(sampler().cases.values()))))
    wanted = [(epoch, index) for epoch in (1, 2) for index in range(50)]
    forward = [first.draw(*one) for one in wanted]
    assert [second.draw(*one) for one in reversed(wanted)] == forward[::-1]
    assert len(set(forward)) > 90


def test_another_seed_or_epoch_draws_other_samples():
    draws = [sampler(seed=0).draw(1, i) for i in range(20)]
    assert draws != [sampler(seed=1).draw(1, i) for i in range(20)]
    assert [d.box for d in draws] != [sampler().draw(2, i).box for i in range(20)]


def test_cases_take_turns():
    names = [sampler().draw(1, index).case_id for index in range(40)]
    assert all(sorted(names[i : i + 4]) == ["a", "bb", "ccc", "nothing"] for i in range(0, 40, 4))


@pytest.mark.parametrize("crop", [(16, 20), (16, 64), (30, 41), (50, 60)])
@pytest.mark.parametrize("slab", [1, 3, 15])
def test_a_crop_lies_in_the_case_or_holds_all_of_it(crop, slab):
    draws = sampler(crop=crop, slab=slab)
    for index in range(100):
        draw = draws.draw(1, index)
        shape = draws.cases[draw.case_id].shape
        for (start, stop), size, length in zip(draw.box, shape, (slab, *crop), strict=True):
            assert stop - start == length
            assert (start >= 0 and stop <= size) or (start <= 0 and stop >= size)


def test_foreground_crops_hold_foreground_of_every_class_equally_often():
    draws = sampler([case("a")], foreground=1.0, empty=0.0)
    held = np.zeros(3)
    for index in range(600):
        (z, _), (y0, y1), (x0, x1) = draws.draw(1, index).box
        for label, voxels in draws.cases["a"].locations.items():
            inside = (voxels[:, 0] == z) & (voxels[:, 1] >= y0) & (voxels[:, 1] < y1)
            held[label] += (inside & (voxels[:, 2] >= x0) & (voxels[:, 2] < x1)).any()
    assert held[1] > 250 and held[2] > 250  # class 2 is one voxel of 501


def test_the_share_of_empty_slices_is_kept():
    cases = [case(name, organ=(0, 10)) for name in ("a", "bb")]  # only slice 10 is empty
    num = sum(sampler(cases, foreground=0.5, empty=0.3).draw(1, i).box[0][0] == 10 for i in range(1000))
    assert 300 < num < 400  # 0.3, and a tenth of the 0.2 drawn anywhere


def test_a_case_without_foreground_and_one_without_empty_slices_are_drawn_anywhere():
    full = CaseExtent("full", (3, 30, 41), {1: np.array([[0, 1, 1], [1, 1, 1], [2, 1, 1]])}, (0, 1, 2))
    draws = sampler([EMPTY, full], foreground=0.5, empty=0.5)
    assert {draws.draw(1, i).box[0][0] for i in range(200) if draws.draw(1, i).case_id == "nothing"} == set(range(6))
    assert {draws.draw(1, i).box[0][0] for i in range(200) if draws.draw(1, i).case_id == "full"} == set(range(3))


def test_the_plain_view_of_a_small_slice_lies_in_the_middle():
    draw = sampler(crop=(40, 50)).view("a", 3, epoch=0)
    assert draw.box == ((3, 4), (-5, 35), (-4, 46))


def test_views_repeat_themselves_and_differ_from_each_other():
    draws = sampler(crop=(40, 50))
    views = [draws.view("a", 3, epoch) for epoch in range(5)]
    assert views == [draws.view("a", 3, epoch) for epoch in range(5)]
    assert all(one.box != other.box for one, other in itertools.combinations(views[1:], 2))


def test_views_of_a_large_slice_look_at_its_foreground():
    draws = sampler([case("a")], crop=(8, 8), foreground=1.0)
    for epoch in range(50):
        _, (y0, y1), (x0, x1) = draws.view("a", 5, epoch).box
        here = draws.cases["a"].locations[1]
        here = here[here[:, 0] == 5]
        assert ((here[:, 1] >= y0) & (here[:, 1] < y1) & (here[:, 2] >= x0) & (here[:, 2] < x1)).any()


@pytest.mark.parametrize("foreground, empty", [(0.5, 0.1), (0.7, 0.3), (0.0, 0.0), (1.0, 0.0), (0.9, 0.9), (0.0, 1.0)])
def test_every_batch_from_a_pool_has_its_quotas(foreground, empty):
    held = np.arange(100) % 5 == 0
    draws = PoolSampler(held.tolist(), Quotas(foreground=foreground, empty=empty), seed=0)
    left = 1 - foreground - min(empty, 1 - foreground)
    assert np.mean([held[draws.draw(n)] for n in range(2000)]) == pytest.approx(foreground + 0.2 * left, abs=0.01)
    for batch in range(50):
        num = sum(held[draws.draw(n)] for n in range(10 * batch, 10 * batch + 10))
        assert num >= int(10 * foreground) and 10 - num >= int(10 * min(empty, 1 - foreground)) - 1


def test_a_pool_is_drawn_whole_before_any_record_comes_again():
    draws = PoolSampler([True] * 3 + [False] * 4, Quotas(foreground=0.5, empty=0.5), seed=0)
    taken = [draws.draw(n) for n in range(24)]
    assert all(set(taken[i : i + 6 : 1]) >= {0, 1, 2} for i in range(0, 24, 6))
    assert {place for place in taken[:8] if place > 2} == {3, 4, 5, 6}
    again = PoolSampler([True] * 3 + [False] * 4, Quotas(foreground=0.5, empty=0.5), seed=0)
    assert [again.draw(n) for n in reversed(range(24))] == taken[::-1]


@pytest.mark.parametrize("held", [[True] * 4, [False] * 4])
def test_a_pool_of_one_kind_gives_it_whatever_the_quotas(held):
    draws = PoolSampler(held, Quotas(foreground=0.6, empty=0.4), seed=0)
    assert {draws.draw(n) for n in range(20)} == {0, 1, 2, 3}


def test_chosen_slices_are_all_with_foreground_their_neighbours_and_a_share_of_the_rest():
    extent = case("a", shape=(100, 30, 41), organ=(40, 60))
    chosen = choose_slices([extent, EMPTY], background_share=0.25, margin=2, seed=0)
    depths = {depth for name, depth in chosen if name == "a"}
    assert len(chosen) == len(set(chosen))
    assert set(range(38, 62)) <= depths
    assert len(depths - set(range(38, 62))) == 19  # a quarter of 76
    assert sum(name == "nothing" for name, _ in chosen) == 2  # of 6, rounded up
    assert choose_slices([EMPTY, extent], background_share=0.25, margin=2, seed=0) == chosen


def test_any_beginning_of_the_chosen_slices_is_a_fair_sample():
    cases = [case(f"case {i}", shape=(50, 30, 41)) for i in range(10)]
    chosen = choose_slices(cases, background_share=1.0, margin=2, seed=0)
    assert len({name for name, _ in chosen[:60]}) == 10
    assert 15 < np.mean([depth for _, depth in chosen[:60]]) < 35
