"""A folder with a CSV file: one row per case, columns image,label,group,split (and id); paths relative to the CSV.

`image` may name several channel files, separated by ";". Without a column `split` folds are drawn; with it, train and
val are the one fold and test is kept apart. labels.json beside the CSV may name the classes: {"background": 0, ...}.
"""

import os
from pathlib import Path

from voxdino.core.errors import DatasetError
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.core.safe_files import read_json
from voxdino.preparation.case import Case, Dataset, Split, SplitName
from voxdino.preparation.findings import Finding
from voxdino.preparation.layouts.description import NamedFiles, require_type, stem_of
from voxdino.preparation.tables import read_table

TABLE = "dataset.csv"
LABELS = "labels.json"

_COLUMNS = ("id", "image", "label", "group", "split")
_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


def recognise(folder: Path, table: Path | None) -> bool:
    return table is not None or any(folder.glob("*.csv"))


def read(folder: Path, table: Path | None, options: ReadOptions, labels: LabelSet | None) -> Dataset:
    """Errors: DatasetError for columns, rows and missing files; SafetyError for paths that leave the folder."""
    path = table or _find_table(folder)
    columns, rows = read_table(path, _COLUMNS, required=("image", "label"))
    files = NamedFiles(folder, options, path)
    drafts = [_case(row, line, path, files) for line, row in rows]
    files.require_all()
    named = _name_cases(drafts, [row.get("id", "") for _, row in rows], folder)
    if labels is None and (folder / LABELS).exists():
        value = require_type(read_json(folder / LABELS), dict, "labels", folder / LABELS, '{"background": 0}')
        labels = LabelSet.from_nnunet(value, where=folder / LABELS)
    cases = tuple(case for case in named if case.label is not None and case.split != "test")
    ids = {side: tuple(case.id for case in cases if case.split == side) for side in _SPLITS}
    unused = [
        Finding(
            severity="note",
            code="D10",
            where=path.name,
            fact=f"the column '{column}' is none of ours.",
            consequence="It is not used.",
            fix=f"columns: {', '.join(_COLUMNS)}.",
        )
        for column in columns
        if column not in _COLUMNS
    ]
    return Dataset(
        root=folder,
        name=folder.name,
        layout="folder",
        channels=(),
        labels=labels,
        cases=cases,
        test_cases=tuple(case for case in named if case.label is None or case.split == "test"),
        splits=(Split(train=ids["train"], val=ids["val"]),) if ids["train"] and ids["val"] else None,
        options=options,
        findings=tuple(unused),
    )


def _find_table(folder: Path) -> Path:
    tables = sorted(folder.glob("*.csv"))
    if folder / TABLE in tables:
        return folder / TABLE
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables[:8])
        fix = f"call the data set's one {TABLE}, or give its path in place of the folder."
        raise DatasetError(f"{len(tables)} CSV files: {names}.", where=folder, fix=fix)
    return tables[0]


def _case(row: dict[str, str], line: int, path: Path, files: NamedFiles) -> Case:
    """The case of one row, still without its id."""
    images = [name.strip() for name in row["image"].split(";") if name.strip()]
    if not images:
        raise DatasetError(f"line {line} names no image.", where=path, fix="fill in the column 'image'.")
    split = row.get("split") or None
    if "split" in row and split not in _SPLITS:
        fact = f"line {line}: the split is '{split or ''}'.{nearest(split or '', _SPLITS)}"
        raise DatasetError(fact, where=path, fix="use train, val or test.")
    if not row["label"] and split in ("train", "val"):
        fact = f"line {line}: split {split} without a label."
        raise DatasetError(fact, where=path, fix="add the label file, or make the split test.")
    return Case(
        id="",
        images=tuple(files.find(name) for name in images),
        label=files.find(row["label"]) if row["label"] else None,
        group=row.get("group") or None,
        split=next((side for side in _SPLITS if side == split), None),
    )


def _name_cases(cases: list[Case], given: list[str], folder: Path) -> list[Case]:
    """Ids: those given, else the image's path below the deepest folder that all images share, "/" as "_"."""
    paths = [case.images[0] for case in cases]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else folder
    stems = [(path.parent / stem_of(path)).relative_to(common).as_posix() for path in paths]
    ids = [name or stem.replace("/", "_") for name, stem in zip(given, stems, strict=True)]
    named = [Case(name, case.images, case.label, case.group, case.split) for name, case in zip(ids, cases, strict=True)]
    return sorted(named, key=lambda case: case.id)
