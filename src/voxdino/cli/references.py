"""Which prediction belongs to which reference, and what their label values mean."""

import csv
from pathlib import Path

from voxdino.core.errors import DatasetError, UsageError
from voxdino.core.io import image_suffix, is_image
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.core.safe_files import read_json, require_file
from voxdino.evaluation.evaluate import pair_files
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.layouts import msd
from voxdino.preparation.plan import Plan

Pairs = list[tuple[str, Path, Path]]
Groups = dict[str, str]


def find_pairs(
    predictions: Path, references: Path, labels_file: Path | None, options: ReadOptions
) -> tuple[Pairs, LabelSet, Groups]:
    """(case id, prediction, reference) of a folder of predictions, the labels they share, and case -> group.

    references: a data set, of which the cases that were predicted count; or a folder of label maps, all of which count.
    Errors: DatasetError where a folder is missing or nothing fits; UsageError where nothing says what the labels mean.
    """
    for folder in (predictions, references):
        if not folder.exists():
            raise DatasetError("no such folder.", where=folder, fix="check the path.")
    if not predictions.is_dir():
        raise DatasetError("is no folder.", where=predictions, fix="give the folder of the predictions.")
    labels = None if labels_file is None else read_labels(labels_file)
    is_dataset = references.suffix == ".csv" or (references / "dataset.json").is_file() or any(references.glob("*.csv"))
    if not is_dataset:
        found = {p.name.removesuffix(image_suffix(p)): p for p in sorted(references.glob("*")) if is_image(p)}
        if labels is None:
            fix = "name the labels with --labels dataset.json (or labels.json, or a run's plan.json)."
            raise UsageError("a folder of label maps does not say what its values mean.", where=references, fix=fix)
        return pair_files(predictions, found), labels, {}
    dataset = read_dataset(references, options, labels=labels)
    labels = dataset.labels
    if labels is None:
        fix = "name them with --labels plan.json of the run (or labels.json)."
        raise UsageError("the data set does not say what its label values mean.", where=references, fix=fix)
    cases = (*dataset.cases, *dataset.test_cases)
    known = {case.id: case.label for case in cases if case.label is not None}
    groups = {case.id: case.group for case in cases if case.group is not None}
    there = {path.name.removesuffix(image_suffix(path)) for path in predictions.glob("*") if is_image(path)}
    pairs = pair_files(predictions, {case: path for case, path in known.items() if case in there} or known)
    return pairs, labels, groups


def read_groups(path: Path, pairs: Pairs) -> Groups:
    """case id -> patient of a CSV table with the columns case and group, which names all cases of the pairs.

    Errors: DatasetError for any other table.
    """
    require_file(path, kind=DatasetError)
    fix = "write two columns with the heading case,group."
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"is no CSV table ({error}).", where=path, fix=fix) from None
    if not rows or rows[0] != ["case", "group"]:
        raise DatasetError(f"has the columns {', '.join(rows[0]) if rows else 'none'}.", where=path, fix=fix)
    odd = next((row for row in rows[1:] if len(row) != 2 or not all(row)), None)
    if odd is not None:
        raise DatasetError(f"the row '{','.join(odd)}' is not a case and its group.", where=path, fix=fix)
    groups = dict(rows[1:])
    if len(groups) != len(rows) - 1:
        raise DatasetError("names a case twice.", where=path, fix="give every case one row.")
    missing = [case for case, _, _ in pairs if case not in groups]
    if missing:
        fact = f"has no row for {len(missing)} of {len(pairs)} cases, among them {missing[0]}."
        raise DatasetError(f"{fact}{nearest(missing[0], groups)}", where=path, fix="give every case its row.")
    return groups


def read_labels(path: Path) -> LabelSet:
    """The labels that a file names: plan.json, dataset.json (nnU-Net, MSD), labels.json {"background": 0, ...}."""
    value = read_json(path)
    if isinstance(value, dict) and "fingerprint_digest" in value:
        return Plan.read(path).labels
    found = value.get("labels", value) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise UsageError("names no labels.", where=path, fix='write {"background": 0, "liver": 1}.')
    if all(isinstance(name, str) for name in found.values()):
        return msd.read_labels(found, path)
    return LabelSet.from_nnunet(found, value.get("regions_class_order"), where=path)
