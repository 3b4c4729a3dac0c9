"""Which prediction belongs to which reference, and what their label values mean."""

from pathlib import Path

from voxdino.core.errors import DatasetError, UsageError
from voxdino.core.io import image_suffix, is_image
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import read_json
from voxdino.evaluation.evaluate import pair_files
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.layouts import msd
from voxdino.preparation.plan import Plan

Pairs = list[tuple[str, Path, Path]]


def find_pairs(
    predictions: Path, references: Path, labels_file: Path | None, options: ReadOptions
) -> tuple[Pairs, LabelSet]:
    """(case id, prediction, reference) of a folder of predictions, and the labels they share.

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
        return pair_files(predictions, found), labels
    dataset = read_dataset(references, options, labels=labels)
    labels = dataset.labels
    if labels is None:
        fix = "name them with --labels plan.json of the run (or labels.json)."
        raise UsageError("the data set does not say what its label values mean.", where=references, fix=fix)
    known = {case.id: case.label for case in (*dataset.cases, *dataset.test_cases) if case.label is not None}
    there = {path.name.removesuffix(image_suffix(path)) for path in predictions.glob("*") if is_image(path)}
    return pair_files(predictions, {case: path for case, path in known.items() if case in there} or known), labels


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
