"""The nnU-Net v2 layout: dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, imagesTs, splits_final.json."""

import re
from pathlib import Path
from typing import Any

from voxdino.core.errors import DatasetError
from voxdino.core.io import READERS
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.core.safe_files import read_json
from voxdino.preparation.case import Case, Dataset, Split
from voxdino.preparation.findings import Finding
from voxdino.preparation.layouts.description import (
    NamedFiles,
    list_folder,
    numbered_names,
    read_description,
    require_type,
    tell_names,
)

DESCRIPTION = "dataset.json"
SPLITS = "splits_final.json"

_REQUIRED = ("channel_names", "labels", "file_ending")
_OPTIONAL = (
    *("name", "description", "reference", "licence", "license", "release", "version", "author", "converted_by"),
    *("numTraining", "numTest", "regions_class_order", "overwrite_image_reader_writer", "dataset", "tensorImageSize"),
    *("modality", "citation", "image_reader_writer", "nnUNet_version"),
)


def recognise(folder: Path, table: Path | None) -> bool:
    return table is None and ((folder / DESCRIPTION).exists() or (folder / "imagesTr").is_dir())


def read(folder: Path, table: Path | None, options: ReadOptions, labels: LabelSet | None) -> Dataset:
    """Errors: DatasetError for keys, file endings, missing or surplus channel and label files."""
    path = folder / DESCRIPTION
    if not path.exists():
        fix = "write it: channel_names, labels and file_ending (nnU-Net v2)."
        raise DatasetError("imagesTr is there, but dataset.json is not.", where=folder, fix=fix)
    value = read_description(path, required=_REQUIRED, optional=_OPTIONAL)
    channels = numbered_names(value["channel_names"], "channel_names", path)
    ending = require_type(value["file_ending"], str, "file_ending", path, '".nii.gz"')
    if ending not in READERS:
        fact = f"'file_ending' is '{ending}', which we do not read.{nearest(ending, READERS)}"
        raise DatasetError(fact, where=path, fix=f"known: {', '.join(READERS)}.")
    if labels is None:
        order = value.get("regions_class_order")
        if order is not None:
            require_type(order, list, "regions_class_order", path, "[1, 2, 3]")
        names = require_type(value["labels"], dict, "labels", path, '{"background": 0, "liver": 1}')
        labels = LabelSet.from_nnunet(names, order, where=path)
    cases: list[Case]
    test: tuple[Case, ...] = ()
    findings: list[Finding] = []
    if "dataset" in value:
        cases = _read_listed(folder, path, value["dataset"], len(channels), options)
    else:
        cases, test, findings = _read_folders(folder, ending, len(channels))
    declared = value.get("numTraining")
    if declared is not None and declared != len(cases):
        findings.append(
            Finding(
                severity="warning",
                code="D18",
                where=DESCRIPTION,
                fact=f"numTraining is {declared}, but there are {len(cases)} labelled cases.",
                consequence="The cases found are used.",
                fix="see whether files are missing; correct numTraining.",
            )
        )
    return Dataset(
        root=folder,
        name=str(value.get("name") or folder.name),
        layout="nnunet",
        channels=channels,
        labels=labels,
        cases=tuple(cases),
        test_cases=test,
        splits=read_splits(folder / SPLITS),
        options=options,
        findings=tuple(findings),
    )


def _read_folders(folder: Path, ending: str, num_channels: int) -> tuple[list[Case], tuple[Case, ...], list[Finding]]:
    images, strangers = _find_images(folder / "imagesTr", ending, num_channels)
    labels = {name.removesuffix(ending): name for name in list_folder(folder / "labelsTr") if name.endswith(ending)}
    bare = sorted(set(images) - set(labels))
    if bare:
        fact = f"{len(bare)} cases of imagesTr have no label in labelsTr: {tell_names(bare)}."
        fix = f"add labelsTr/CASE{ending}, or move the images to imagesTs."
        raise DatasetError(fact, where=folder, fix=fix)
    test_images, test_strangers = _find_images(folder / "imagesTs", ending, num_channels)
    test_labels = set(list_folder(folder / "labelsTs"))
    cases = [Case(name, files, folder / "labelsTr" / labels[name]) for name, files in sorted(images.items())]
    test = tuple(
        Case(name, files, folder / "labelsTs" / f"{name}{ending}" if f"{name}{ending}" in test_labels else None)
        for name, files in sorted(test_images.items())
    )
    strangers = [f"imagesTr/{name}" for name in strangers] + [f"imagesTs/{name}" for name in test_strangers]
    findings = [
        Finding(
            severity="note",
            code="D19",
            where=name,
            fact=f"is not named CASE_0000{ending}.",
            consequence="It is left aside.",
            fix="rename it if it belongs to the data set.",
        )
        for name in strangers
    ]
    for name in sorted(set(labels) - set(images)):
        findings.append(
            Finding(
                severity="warning",
                code="A32",
                where=f"labelsTr/{labels[name]}",
                fact="is a label without an image.",
                consequence="It is left aside.",
                fix=f"add imagesTr/{name}_0000{ending}, or remove the label.",
            )
        )
    return cases, test, findings


def _find_images(folder: Path, ending: str, num_channels: int) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """Case -> its channel files, and the names that do not fit. Errors: DatasetError listing incomplete cases."""
    in_folders = "?" if ending == ".dcm" else ""  # a DICOM scan is a folder CASE_0000, or one file
    pattern = re.compile(rf"(.+)_(\d{{4}})(?:{re.escape(ending)}){in_folders}")
    found: dict[str, dict[int, str]] = {}
    strangers = []
    for name in list_folder(folder):
        match = pattern.fullmatch(name)
        if match is None:
            strangers.append(name)
        else:
            found.setdefault(match[1], {})[int(match[2])] = name
    wanted = list(range(num_channels))
    odd = [name for name, files in found.items() if sorted(files) != wanted]
    if odd:
        told = tell_names(f"{name} (has {', '.join(f'{n:04d}' for n in sorted(found[name]))})" for name in odd)
        raise DatasetError(
            f"{len(odd)} cases do not have the channels {', '.join(f'{n:04d}' for n in wanted)}: {told}.",
            where=folder,
            fix="add the missing files, remove the surplus ones, or correct channel_names.",
        )
    return {name: tuple(folder / files[n] for n in wanted) for name, files in found.items()}, strangers


def _read_listed(folder: Path, path: Path, listed: Any, num_channels: int, options: ReadOptions) -> list[Case]:
    """Cases that dataset.json lists itself: {"case": {"images": [...], "label": ...}}."""
    require_type(listed, dict, "dataset", path, '{"case": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}')
    files = NamedFiles(folder, options, path)
    cases = []
    for name, entry in sorted(listed.items()):
        require_type(entry, dict, f"dataset.{name}", path, '{"images": ["a.nii.gz"], "label": "b.nii.gz"}')
        images = require_type(entry.get("images"), list, f"dataset.{name}.images", path, '["a.nii.gz"]')
        label = require_type(entry.get("label"), str, f"dataset.{name}.label", path, '"b.nii.gz"')
        if len(images) != num_channels:
            fact = f"dataset.{name} lists {len(images)} images for {num_channels} channels."
            raise DatasetError(fact, where=path, fix="list one file per channel.")
        cases.append(Case(name, tuple(files.find(str(image)) for image in images), files.find(label)))
    files.require_all()
    return cases


def read_splits(path: Path) -> tuple[Split, ...] | None:
    """The folds of splits_final.json, or None where there is no such file. Errors: ConfigError, DatasetError."""
    if not path.exists():
        return None
    value = read_json(path)
    require_type(value, list, "splits", path, '[{"train": ["a"], "val": ["b"]}]')
    if not value:
        raise DatasetError("holds no fold.", where=path, fix="remove the file, or write folds.")
    return tuple(Split.from_json(fold, where=path) for fold in value)
