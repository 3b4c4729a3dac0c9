"""Which cases to predict: from files, folders of files, or a data set."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from voxdino.core.errors import DatasetError, UsageError
from voxdino.core.io import DICOM_SUFFIXES, image_suffix, is_image, is_scan
from voxdino.core.io.options import ReadOptions
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.plan import Plan
from voxdino.preparation.scans import cases_of_scan

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def num_source_channels(plan: Plan) -> int:
    """How many channels an image must have for the plan."""
    return max(channel.source for channel in plan.channels) + 1


def find_cases(
    inputs: Sequence[Path], options: ReadOptions | None = None, *, num_channels: int = 1, series: str | None = None
) -> list[Case]:
    """The cases of image files, of folders of image files, and of data sets (their test cases, or all if none).

    A folder or archive of DICOM files is one case per series; a folder of such folders, the cases of each.
    num_channels: of the images that the model needs (`num_source_channels`), see `group_channels`.
    series: of DICOM scans, only this one.
    Whatever has an image's name counts, broken links and named pipes too: their cases fail by name later.
    Errors: DatasetError for a path that is not there or holds no image; UsageError for equal case ids.
    """
    cases: list[Case] = []
    for path in inputs:
        if path.is_dir() and (path / "dataset.json").is_file():
            dataset = read_dataset(path, options or ReadOptions())
            cases += dataset.test_cases or dataset.cases
        elif path.is_dir():
            found = group_channels(_images_in(path), num_channels)
            if not found or is_scan(path):
                found += _scans_in(path, series)
            if not found:
                raise DatasetError("holds no image.", where=path, fix="give a folder of images, or image files.")
            cases += found
        elif path.is_file() and is_scan(path):
            cases += cases_of_scan(path, series=series)
        elif os.path.lexists(path):
            cases += group_channels([path], num_channels)
        else:
            raise DatasetError("no such file or folder.", where=path, fix="check the path.")
    by_id: dict[str, Case] = {}
    for case in cases:
        other = by_id.setdefault(case.id, case)
        if (other.images, other.series) != (case.images, case.series):
            first, second = other.images[0], case.images[0]
            names = f"{first.name} and {second.name}" if first.name != second.name else f"{first} and {second}"
            fact = f"several inputs are called {case.id}: {names}."
            raise UsageError(fact, fix="predict them in separate calls, or rename one.")
    return list(by_id.values())


def group_channels(files: Iterable[Path], num_channels: int = 1) -> list[Case]:
    """Cases of image files, sorted by id; CASE_0000 beside CASE_0001, ... are the channels of one case, as in nnU-Net.

    For a model of one channel only a CASE_0000 that stands alone is called CASE; CASE_0000, CASE_0001 are then two
    cases. For one of several, a channel file brings the others along, a gap between them too (it fails by name), and a
    single file is expected to hold all channels, if need be as frames. Files without a CASE_0000 are no channels.
    """
    beside: dict[Path, dict[tuple[str, str], dict[int, Path]]] = {}
    cases: dict[tuple[Path, ...], Case] = {}
    for file in files:
        stem, suffix = _split(file)
        images: tuple[Path, ...] = (file,)
        name = stem
        if match := _CHANNEL.fullmatch(stem):
            if file.parent not in beside:
                beside[file.parent] = _channels_in(file.parent)
            group = beside[file.parent].get((match[1], suffix.lower()), {})
            if 0 in group and (num_channels > 1 or len(group) == 1):
                name = match[1]
                missing = (file.with_name(f"{name}_{index:04d}{suffix}") for index in range(max(group) + 1))
                images = tuple(group.get(index, path) for index, path in enumerate(missing))
        cases[images] = Case(name, images, None, frames_as_channels=num_channels > 1 and len(images) == 1)
    return sorted(cases.values(), key=lambda case: case.id)


def _scans_in(folder: Path, series: str | None) -> list[Case]:
    """The cases of a DICOM folder, or of the folders and archives in it."""
    if is_scan(folder):
        return cases_of_scan(folder.absolute(), series=series)
    entries = sorted(entry for entry in folder.absolute().iterdir() if not entry.name.startswith("."))
    inside = [entry for entry in entries if entry.is_dir() or is_scan(entry)]
    return [case for entry in inside for case in cases_of_scan(entry, series=series)]


def _images_in(folder: Path) -> list[Path]:
    """The image files directly in a folder but DICOM, of which many make one image."""
    files = (file for file in folder.iterdir() if is_image(file) and not file.is_dir())
    return sorted(file for file in files if image_suffix(file) not in DICOM_SUFFIXES)


def _channels_in(folder: Path) -> dict[tuple[str, str], dict[int, Path]]:
    """(CASE, suffix) -> channel number -> file."""
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for file in _images_in(folder):
        stem, suffix = _split(file)
        if match := _CHANNEL.fullmatch(stem):
            found.setdefault((match[1], suffix.lower()), {})[int(match[2])] = file
    return found


def _split(file: Path) -> tuple[str, str]:
    suffix = image_suffix(file)
    stem = file.name[: len(file.name) - len(suffix)]
    return stem, file.name[len(stem) :]
