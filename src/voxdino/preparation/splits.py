"""Folds: who is trained on and who is held back. Seeded, groups never torn apart, given splits respected."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from voxdino.core.errors import ConfigError, DatasetError
from voxdino.core.records import nearest
from voxdino.core.safe_files import read_json
from voxdino.preparation.case import Case, Dataset, Split

__all__ = ["Split", "deal", "make_splits", "read_split"]

_PREPARE_AGAIN = "run `voxdino prepare DATASET` again."


def make_splits(dataset: Dataset, num_folds: int = 5, seed: int = 0) -> tuple[Split, ...]:
    """The folds of a data set: those it comes with, else `num_folds` of nearly equal size.

    Groups (patients, sites) are shuffled with `seed` and dealt, largest first, to the fold with the fewest cases.
    Errors: DatasetError for too few cases or groups, unknown ids, a case or a group on both sides.
    """
    if dataset.splits is not None:
        for number, split in enumerate(dataset.splits):
            _require_sound(dataset, split, number)
        return dataset.splits
    groups: dict[str, list[str]] = {}
    for case in dataset.cases:
        groups.setdefault(_group(case), []).append(case.id)
    if len(dataset.cases) < 3:
        fact = f"{len(dataset.cases)} labelled cases are too few to train on some and hold back others."
        raise DatasetError(fact, where=dataset.root, fix="add cases: three at least, dozens to learn anything.")
    if len(groups) < 2:
        fact = "all cases are of one group: none can be held back."
        raise DatasetError(fact, where=dataset.root, fix="name the patient or site of each case, or add other groups.")
    if num_folds < 2 or num_folds > len(groups):
        what = "cases" if len(groups) == len(dataset.cases) else "groups"
        fact = f"{num_folds} folds cannot be made of {len(groups)} {what}."
        raise DatasetError(fact, where=dataset.root, fix=f"say --set plan.num_folds=N with N from 2 to {len(groups)}.")
    folds = deal(groups, num_folds, seed=seed)
    everyone = sorted(case.id for case in dataset.cases)
    return tuple(
        Split(train=tuple(i for i in everyone if i not in held_back), val=tuple(sorted(held_back)))
        for held_back in map(set, folds)
    )


def deal(
    groups: Mapping[str, Sequence[str]], num_folds: int, *, seed: int, kinds: Mapping[str, str] | None = None
) -> list[list[str]]:
    """Ids in `num_folds` parts of nearly equal size, groups whole: shuffled, the largest dealt first.

    kinds: of the groups; those of one kind are dealt to the part that has fewest cases of it.
    """
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: -len(groups[name]))  # stable: equal sizes stay shuffled
    folds: list[list[str]] = [[] for _ in range(num_folds)]
    counts: list[Counter[str]] = [Counter() for _ in range(num_folds)]
    for name in order:
        kind = kinds[name] if kinds else ""
        place = min(range(num_folds), key=lambda number: (counts[number][kind], len(folds[number])))
        folds[place].extend(groups[name])
        counts[place][kind] += len(groups[name])
    return folds


def read_split(path: Path, fold: int) -> Split:
    """A fold of splits.json. Errors: DatasetError, ConfigError where there is none, or one side of it is empty."""
    if not path.is_file():
        raise DatasetError("no splits here.", where=path, fix=_PREPARE_AGAIN)
    splits = read_json(path)
    if not isinstance(splits, list):
        raise ConfigError("holds no list of folds.", where=path, fix=_PREPARE_AGAIN)
    if not 0 <= fold < len(splits):
        raise ConfigError(
            f"there is no fold {fold}; the splits have {len(splits)}",
            where=path,
            fix=f"choose one from 0 to {len(splits) - 1}.",
        )
    split = Split.from_json(splits[fold], where=path)
    if not split.train or not split.val:
        raise DatasetError(
            f"fold {fold} has {len(split.train)} training and {len(split.val)} validation cases",
            where=path,
            fix="give each side at least one case.",
        )
    return split


def _group(case: Case) -> str:
    """The group, or a name for the case alone that no group can have."""
    return f"group {case.group}" if case.group is not None else f"case {case.id}"


def _require_sound(dataset: Dataset, split: Split, number: int) -> None:
    where, fold = dataset.root, f"fold {number} of the given splits"
    group_of = {case.id: _group(case) for case in dataset.cases}
    unknown = [name for name in (*split.train, *split.val) if name not in group_of]
    if unknown:
        fact = f"{fold} names {len(unknown)} cases that do not exist: {', '.join(unknown[:5])}."
        fix = "correct splits_final.json (or the column 'split')."
        raise DatasetError(fact + nearest(unknown[0], group_of), where=where, fix=fix)
    if not split.train or not split.val:
        side = "validation" if split.train else "training"
        raise DatasetError(f"{fold} has no {side} case.", where=where, fix="put one case there at least.")
    both = sorted({group_of[name] for name in split.train} & {group_of[name] for name in split.val})
    if both:
        fact = f"{fold} has {', '.join(both[:5])} both in training and in validation."
        raise DatasetError(fact, where=where, fix="keep every case and every group on one side.")
