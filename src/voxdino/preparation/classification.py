"""Data sets with labels per case: MedMNIST's .npz files, and a CSV table beside pictures or volumes.

The table is `labels.csv` in the folder of the set, a row per case: file,label[,split][,group][,id], with paths from
there. Several labels are separated by "|"; "" is none of them, in a set of several labels. `classes.json` beside it
(for NAME.npz: NAME.json) may say what labels cannot: {"kind": "ordinal", "classes": ["mild", "severe"]}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from voxdino.core.errors import DatasetError
from voxdino.core.io import read_grid, read_volume
from voxdino.core.labels import LabelKind
from voxdino.core.records import Record, nearest
from voxdino.core.safe_files import digest_file, digest_json, require_inside
from voxdino.preparation.array_files import array_facts, open_array
from voxdino.preparation.case import SplitName
from voxdino.preparation.made_record import source_digest
from voxdino.preparation.splits import deal
from voxdino.preparation.tables import read_table

TABLE, CLASSES = "labels.csv", "classes.json"
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")

_COLUMNS = ("id", "file", "label", "split", "group")
_SEPARATOR = "|"
_FIX_TABLE = f"give a .npz file of MedMNIST, or a folder with {TABLE} (columns file,label and, if wanted, split,group)."
_FIX_ARRAY = "give a set of MedMNIST, such as pneumoniamnist.npz."


class ClassNames(Record):
    """classes.json: what kind of labels the table has, and all classes, for ordinal ones from least to most."""

    kind: LabelKind = "single"
    classes: tuple[str, ...]


@dataclass(frozen=True)
class LabelledCase:
    """One case and what it is.

    file:   its image, or the file of the array that holds it.
    labels: its class; of a set of several labels 0 or 1 for each class. Empty where it is not known.
    array:  name of the array in the file, where it is one of many; row: its place there.
    """

    id: str
    file: Path
    labels: tuple[int, ...]
    group: str | None = None
    array: str | None = None
    row: int = 0


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled cases to train on, to choose with, and to test on.

    kind:   "single": one class of many; "multi": any number of them; "ordinal": one of classes that have an order.
    ndim:   spatial dimensions: 2 for pictures, 3 for volumes.
    digest: SHA-256 of the file or the table. Images that lie in files of their own do not enter it.
    """

    name: str
    path: Path
    kind: LabelKind
    ndim: int
    class_names: tuple[str, ...]
    splits: dict[SplitName, tuple[LabelledCase, ...]]
    digest: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def has_groups(self) -> bool:
        """Patients or sites are named."""
        return any(case.group is not None for cases in self.splits.values() for case in cases)

    def labels(self, split: SplitName) -> Int[np.ndarray, " N"] | Int[np.ndarray, "N K"]:
        """Classes (N,), or 0 and 1 (N, K) where there are several labels."""
        rows = np.array([case.labels for case in self.splits[split]], dtype=np.int64)
        return rows if self.kind == "multi" else rows.reshape(-1)

    def content_digest(self, *splits: SplitName) -> str:
        """`digest`, and that of every image of these splits that lies in a file of its own: SHA-256.

        Errors: DatasetError for a file that cannot be read.
        """
        cases = [case for split in splits for case in self.splits[split]]
        files = {file: source_digest(file) for file in sorted({case.file for case in cases} - {self.path})}
        return digest_json([self.digest, [[case.id, files[case.file]] for case in cases]]) if files else self.digest


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """array: (C, *spatial) in the file's own values.   spacing: of its voxels, in array order; 1 where nobody knows."""

    array: NDArray[Any]
    spacing: tuple[float, ...]


def open_classification_set(path: str | PathLike[str]) -> ClassificationSet:
    """The set in a .npz file, or in a folder with labels.csv (or at the path of such a table). No image is read.

    Where no split is given, groups (patients, sites) are dealt in fifths, evenly over the classes: three to train, one
    to val, one to test; where only train and test are given, a fifth of train becomes val. Always the same.
    Errors: DatasetError naming what is missing; SafetyError for paths that leave the folder.
    """
    place = Path(path)
    if place.suffix.lower() == ".npz":
        return _open_arrays(place)
    table = place / TABLE if place.is_dir() else place
    if not table.is_file() or table.suffix.lower() != ".csv":
        raise DatasetError("is no set of labelled images.", where=path, fix=_FIX_TABLE)
    return _open_table(table)


def is_classification_set(path: str | PathLike[str]) -> bool:
    """Whether `open_classification_set` is the one to open it; the content is not looked at."""
    place = Path(path)
    return place.suffix.lower() == ".npz" or (place / TABLE).is_file() or place.name == TABLE


def load_image(case: LabelledCase) -> LabelledImage:
    """The image of a case. Errors: those of reading it; DatasetError where it is none of the set's any more."""
    if case.array is None:
        volume = read_volume(case.file)
        return LabelledImage(volume.array, tuple(volume.grid.spacing))
    row = open_array(case.file, case.array)[case.row]
    is_colour = row.shape[-1:] == (3,) and row.ndim == 3
    array = np.moveaxis(row, -1, 0) if is_colour else row[None]
    return LabelledImage(array, (1.0,) * (array.ndim - 1))


def label_texts(case: LabelledCase, known: ClassificationSet) -> str:
    """The labels as the table writes them: "mild", "edema|effusion"."""
    if known.kind != "multi":
        return known.class_names[case.labels[0]] if case.labels else ""
    return _SEPARATOR.join(name for name, there in zip(known.class_names, case.labels, strict=True) if there)


def _open_arrays(path: Path) -> ClassificationSet:
    facts = array_facts(path)
    splits: dict[SplitName, tuple[LabelledCase, ...]] = {}
    labels: dict[SplitName, NDArray[Any]] = {}
    shapes = set()
    for split in SPLITS:
        for name in (f"{split}_images", f"{split}_labels"):
            if name not in facts:
                fact = f"has no {name} (found: {', '.join(sorted(facts)[:6]) or 'nothing'})."
                raise DatasetError(fact, where=path, fix=_FIX_ARRAY)
        shape, dtype = facts[f"{split}_images"]
        found = labels[split] = open_array(path, f"{split}_labels")
        if dtype != np.uint8 or len(shape) not in (3, 4) or not all(shape):
            told = f"{split}_images is {dtype} of {' x '.join(map(str, shape))}: no 8-bit images."
            raise DatasetError(told, where=path, fix=_FIX_ARRAY)
        if len(found) != shape[0] or found.dtype.kind not in "iub" or found.ndim > 2 or (found < 0).any():
            told = f"{split}_labels is {found.dtype} of {' x '.join(map(str, found.shape))} for {shape[0]} images."
            raise DatasetError(told, where=path, fix="give one row of whole numbers from 0 on for each image.")
        shapes.add((shape[1:], found.reshape(len(found), -1).shape[1]))
    if len(shapes) > 1:
        told = "train, val and test hold images of different sizes, or different numbers of labels."
        raise DatasetError(told, where=path, fix=_FIX_ARRAY)
    shape, num_labels = shapes.pop()
    highest = max(int(one.max()) for one in labels.values())
    names, kind, described = _describe(path, num_labels, highest)
    if num_labels > 1 and highest > 1:
        raise DatasetError("several labels per image must be 0 or 1.", where=path, fix=_FIX_ARRAY)
    for split, rows in labels.items():
        values = rows.reshape(len(rows), -1).tolist()
        splits[split] = tuple(
            LabelledCase(f"{split}_{row:06d}", path, tuple(map(int, one)), array=f"{split}_images", row=row)
            for row, one in enumerate(values)
        )
    return ClassificationSet(
        name=path.stem,
        path=path,
        kind=kind,
        ndim=2 if len(shape) == 2 or shape[-1] == 3 else 3,
        class_names=names,
        splits=splits,
        digest=digest_json({"arrays": digest_file(path), "classes": described and described.to_json()}),
    )


def _describe(path: Path, num_labels: int, highest: int) -> tuple[tuple[str, ...], LabelKind, ClassNames | None]:
    """Names and kind of an array's labels, as the .json beside it says (the third value), else as they are found."""
    names = tuple(map(str, range(num_labels if num_labels > 1 else highest + 1)))
    file = path.with_suffix(".json")
    if not file.is_file():
        return names, "multi" if num_labels > 1 else "single", None
    told = ClassNames.read(file)
    if len(told.classes) < len(names) or (told.kind == "multi") != (num_labels > 1):
        fact = f"its {file.name} names {len(told.classes)} classes of kind {told.kind}; that is another set."
        raise DatasetError(fact, where=path, fix=f"correct {file.name}, or remove it.")
    return told.classes, told.kind, told


def _open_table(table: Path) -> ClassificationSet:
    folder = table.parent
    _, rows = read_table(table, _COLUMNS, required=("file", "label"))
    if not rows:
        raise DatasetError("names no case.", where=table, fix="write one row per case.")
    told = ClassNames.read(folder / CLASSES) if (folder / CLASSES).is_file() else None
    names, kind = _classes(rows, told, table)
    cases, given = [], []
    for line, row in rows:
        file = require_inside(folder, row["file"])
        if not file.is_file():
            raise DatasetError(f"line {line}: {row['file']} is not there.", where=table, fix="correct the path.")
        labels = _indices(row["label"], names, kind, table, line)
        cases.append(LabelledCase(row.get("id") or row["file"], file, labels, row.get("group") or None))
        given.append(_split_of(row, line, table))
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DatasetError(f"names {twice} twice.", where=table, fix="give each case one row (and an id of its own).")
    grid, _ = read_grid(cases[0].file)
    return ClassificationSet(
        name=folder.resolve().name,
        path=table,
        kind=kind,
        ndim=grid.ndim,
        class_names=names,
        splits=_splits(cases, given, table),
        digest=digest_json({"table": digest_file(table), "classes": told and told.to_json()}),
    )


def _classes(
    rows: Sequence[tuple[int, dict[str, str]]], told: ClassNames | None, table: Path
) -> tuple[tuple[str, ...], LabelKind]:
    """Names and kind: as classes.json says, else those found, numbers in their order."""
    found = {part for _, row in rows for part in _parts(row["label"])}
    if told is not None:
        unknown = sorted(found - set(told.classes))
        if unknown:
            fact = f"has the label '{unknown[0]}', which {CLASSES} does not name.{nearest(unknown[0], told.classes)}"
            raise DatasetError(fact, where=table, fix=f"classes: {', '.join(told.classes)}.")
        return told.classes, told.kind
    if len(found) < 2:
        fact = f"has {len(found)} classes ({', '.join(found) or 'no label'}); two at least are needed."
        raise DatasetError(fact, where=table, fix="label cases of every class.")
    several = any(len(_parts(row["label"])) > 1 for _, row in rows)
    is_number = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=int if is_number else str)), "multi" if several else "single"


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(_SEPARATOR) if part.strip()]


def _indices(text: str, names: tuple[str, ...], kind: LabelKind, table: Path, line: int) -> tuple[int, ...]:
    parts = _parts(text)
    if kind == "multi":
        return tuple(int(name in parts) for name in names)
    if len(parts) != 1:
        fact = f"line {line}: {len(parts)} labels in a set of one label per case."
        raise DatasetError(fact, where=table, fix=f'give one; for several, {CLASSES} says {{"kind": "multi", ...}}.')
    return (names.index(parts[0]),)


def _split_of(row: dict[str, str], line: int, table: Path) -> SplitName | None:
    text = row.get("split", "")
    split = next((side for side in SPLITS if side == text), None)
    if "split" in row and split is None:
        fact = f"line {line}: the split is '{text}'.{nearest(text, SPLITS)}"
        raise DatasetError(fact, where=table, fix="use train, val or test.")
    return split


def _splits(
    cases: Sequence[LabelledCase], given: Sequence[SplitName | None], table: Path
) -> dict[SplitName, tuple[LabelledCase, ...]]:
    """The given splits, completed where val, or all of them, are missing. Errors: DatasetError for torn groups."""
    splits: dict[SplitName, list[LabelledCase]] = {side: [] for side in SPLITS}
    for case, side in zip(cases, given, strict=True):
        splits[side or "train"].append(case)
    if given[0] is None:
        fifths = _fifths(splits["train"], table)
        splits = {"train": [*fifths[2], *fifths[3], *fifths[4]], "val": fifths[1], "test": fifths[0]}
    elif not splits["val"]:
        fifths = _fifths(splits["train"], table)
        splits |= {"train": [case for part in fifths[1:] for case in part], "val": fifths[0]}
    sides: dict[str, SplitName] = {}
    for side, part in splits.items():
        if not part:
            raise DatasetError(f"has no {side} case.", where=table, fix="put one case there at least.")
        for case in part:
            if case.group is not None and sides.setdefault(case.group, side) != side:
                fact = f"the group {case.group} is both in {sides[case.group]} and in {side}."
                raise DatasetError(fact, where=table, fix="keep every patient or site on one side.")
    return {side: tuple(part) for side, part in splits.items()}


def _fifths(cases: Sequence[LabelledCase], table: Path) -> list[list[LabelledCase]]:
    """Five parts of nearly equal size and mix of classes, groups whole."""
    groups: dict[str, list[LabelledCase]] = {}
    for case in cases:
        groups.setdefault(f"group {case.group}" if case.group is not None else f"case {case.id}", []).append(case)
    if len(groups) < 5:
        what = "cases" if len(groups) == len(cases) else "groups"
        fact = f"{len(groups)} {what} are too few to hold some of them back."
        raise DatasetError(
            fact, where=table, fix="add cases, or say in a column 'split' which are train, val and test."
        )
    kinds = {name: str(part[0].labels) for name, part in groups.items()}
    folds = deal({name: [case.id for case in part] for name, part in groups.items()}, 5, seed=0, kinds=kinds)
    by_id = {case.id: case for case in cases}
    return [[by_id[name] for name in sorted(fold)] for fold in folds]
