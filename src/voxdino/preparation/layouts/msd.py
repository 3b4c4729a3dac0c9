"""The Medical Segmentation Decathlon layout: dataset.json lists image and label files; one file holds all channels."""

from pathlib import Path
from typing import Any

from voxdino.core.errors import DatasetError
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.core.safe_files import read_json
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.layouts.description import (
    NamedFiles,
    numbered_names,
    read_description,
    require_type,
    stem_of,
)
from voxdino.preparation.layouts.nnunet import DESCRIPTION, SPLITS, read_splits

_REQUIRED = ("modality", "labels", "training")
_OPTIONAL = (
    *("name", "description", "reference", "licence", "license", "release", "relase", "tensorImageSize"),
    *("numTraining", "numTest", "test", "channel_names", "file_ending", "author", "citation"),
)
_EXAMPLE = '[{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]'


def recognise(folder: Path, table: Path | None) -> bool:
    path = folder / DESCRIPTION
    if table is not None or not path.exists():
        return False
    value = read_json(path)
    return isinstance(value, dict) and "training" in value


def read(folder: Path, table: Path | None, options: ReadOptions, labels: LabelSet | None) -> Dataset:
    """Errors: DatasetError for keys and missing files (all of them listed), SafetyError for paths that leave."""
    path = folder / DESCRIPTION
    value = read_description(path, required=_REQUIRED, optional=_OPTIONAL)
    channels = numbered_names(value["modality"], "modality", path)
    if labels is None:
        labels = read_labels(value["labels"], path)
    files = NamedFiles(folder, options, path)
    training = require_type(value["training"], list, "training", path, _EXAMPLE)
    test = require_type(value.get("test", []), list, "test", path, '["./imagesTs/b.nii.gz"]')
    cases = [_case(entry, f"training.{n}", path, files) for n, entry in enumerate(training)]
    test_cases = [_case(entry, f"test.{n}", path, files) for n, entry in enumerate(test)]
    files.require_all()
    bare = [case.id for case in cases if case.label is None]
    if bare:
        fact = f"'training' has no label for {', '.join(bare[:5])}."
        raise DatasetError(fact, where=path, fix="add the label files, or move the entries to 'test'.")
    return Dataset(
        root=folder,
        name=str(value.get("name") or folder.name),
        layout="msd",
        channels=channels,
        labels=labels,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        test_cases=tuple(sorted(test_cases, key=lambda case: case.id)),
        splits=read_splits(folder / SPLITS),
        options=options,
    )


def read_labels(value: Any, path: Path) -> LabelSet:
    """The labels {"0": "background", "1": "liver"}, or the other way round. Errors: DatasetError."""
    require_type(value, dict, "labels", path, '{"0": "background", "1": "liver"}')
    if all(isinstance(name, str) for name in value.values()):
        numbers = {str(name): int(number) for number, name in value.items() if number.isascii() and number.isdigit()}
        if len(numbers) != len(value):
            fact = f"'labels' has {len(value)} entries that do not pair numbers with different names."
            raise DatasetError(fact, where=path, fix='write "labels": {"0": "background", "1": "liver"}.')
        zero = next((name for name, number in numbers.items() if number == 0), None)
        if zero is not None and "background" not in numbers:
            numbers["background"] = numbers.pop(zero)
        value = dict(sorted(numbers.items(), key=lambda item: item[1]))
    return LabelSet.from_nnunet(value, where=path)


def _case(entry: Any, key: str, path: Path, files: NamedFiles) -> Case:
    entry = {"image": entry} if isinstance(entry, str) else entry
    require_type(entry, dict, key, path, _EXAMPLE[1:-1])
    unknown = [name for name in entry if name not in ("image", "label")]
    if unknown or not isinstance(entry.get("image"), str) or not isinstance(entry.get("label", ""), str):
        hint = nearest(unknown[0], ("image", "label")) if unknown else ""
        fact = f"'{key}' is {str(entry)[:80]}.{hint}"
        raise DatasetError(fact, where=path, fix=f"write {_EXAMPLE[1:-1]}.")
    image = files.find(entry["image"])
    label = files.find(entry["label"]) if "label" in entry else None
    return Case(stem_of(image), (image,), label, frames_as_channels=True)
