"""Folds hold every case back once, tear no group apart, and depend on the seed alone."""

from collections import Counter
from pathlib import Path

import pytest

from voxdino.core.errors import DatasetError
from voxdino.core.io.options import ReadOptions
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.splits import Split, make_splits


def dataset_of(groups, splits=None):
    cases = tuple(Case(f"c{n:02d}", (Path(f"{n}.png"),), Path(f"{n}.png"), group) for n, group in enumerate(groups))
    return Dataset(Path("set"), "set", "folder", (), None, cases, (), splits, ReadOptions())


GROUPS = [None] * 6 + ["a"] * 5 + ["b"] * 3 + ["c", "d"] * 2 + ["case c00"]


@pytest.mark.parametrize("num_folds", [2, 3, 5, 11])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_case_is_held_back_once_and_no_group_is_torn(num_folds, seed):
    dataset = dataset_of(GROUPS)
    folds = make_splits(dataset, num_folds, seed)
    held_back = Counter(name for fold in folds for name in fold.val)
    assert len(folds) == num_folds and held_back == {case.id: 1 for case in dataset.cases}
    group = {case.id: case.group or case.id for case in dataset.cases}
    for fold in folds:
        assert sorted(fold.train + fold.val) == sorted(group)
        assert not {group[i] for i in fold.train} & {group[i] for i in fold.val}


def test_folds_of_ungrouped_cases_are_of_equal_size():
    sizes = [len(fold.val) for fold in make_splits(dataset_of([None] * 23), 5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


def test_the_seed_decides_and_the_order_of_the_cases_does_not():
    dataset = dataset_of(GROUPS)
    backwards = Dataset(**{**vars(dataset), "cases": dataset.cases[::-1]})
    assert make_splits(dataset, 5, 3) == make_splits(dataset, 5, 3) == make_splits(backwards, 5, 3)
    assert make_splits(dataset, 5, 3) != make_splits(dataset, 5, 4)


def test_given_splits_are_taken_as_they_are():
    given = (Split(train=("c00", "c01"), val=("c02",)), Split(train=("c02",), val=("c00",)))
    assert make_splits(dataset_of([None] * 4, given), num_folds=3, seed=9) == given


@pytest.mark.parametrize(
    "groups, num_folds, words",
    [
        ([None] * 1, 5, "1 labelled cases are too few"),
        ([None] * 2, 2, "2 labelled cases are too few"),
        ([None] * 4, 5, "5 folds cannot be made of 4 cases"),
        (["a"] * 9 + ["b"] * 9, 5, "5 folds cannot be made of 2 groups"),
        ([None] * 4, 1, "--set plan.num_folds=N with N from 2 to 4"),
        (["a"] * 4, 2, "all cases are of one group"),
    ],
)
def test_too_few_cases_or_groups_are_refused_with_a_fix(groups, num_folds, words):
    with pytest.raises(DatasetError, match=words) as caught:
        make_splits(dataset_of(groups), num_folds)
    assert caught.value.fix


@pytest.mark.parametrize(
    "split, words",
    [
        (Split(train=("c00", "c1"), val=("c02",)), "do not exist: c1. Did you mean 'c"),
        (Split(train=("c00", "c01"), val=("c01",)), "case c01 both in training"),
        (Split(train=("c00",), val=("c03",)), "group p both in training"),
        (Split(train=("c00",), val=()), "no validation case"),
    ],
)
def test_unsound_given_splits_are_refused(split, words):
    with pytest.raises(DatasetError, match=words):
        make_splits(dataset_of(["p", None, None, "p"], (split,)))


def test_cases_set_aside_leave_their_splits():
    dataset = dataset_of([None] * 4, (Split(train=("c00", "c01"), val=("c02", "c03")),)).without({"c01", "c03"})
    assert dataset.splits == (Split(train=("c00",), val=("c02",)),) and len(dataset.cases) == 2
