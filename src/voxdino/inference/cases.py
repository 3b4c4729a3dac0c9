"""Which cases to predict: from files, folders of files, or a data set."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from voxdino.core.errors import DatasetError, UsageError
from voxdino.core.io import image_suffix, is_image
from voxdino.core.io.options import ReadOptions
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.plan import Plan

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def num_source_channels(plan: Plan) -> int:
    """How many channels an image must have for the plan."""
    return max(channel.source for channel in plan.channels) + 1


def find_cases(inputs: Sequence[Path], options: ReadOptions | None = None, *, num_channels: int = 1) -> list[Case]:
    """The cases of image files, of folders of image files, and of data sets (their test cases, or all if none).

    num_channels: of the images that the model needs (`num_source_channels`), see `group_channels`.
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
            if not found:
                raise DatasetError("holds no image.", where=path, fix="give a folder of images, or image files.")
            cases += found
        elif os.path.lexists(path):
            cases += group_channels([path], num_channels)
        else:
            raise DatasetError("no such file or folder.", where=path, fix="check the path.")
    by_id: dict[str, Case] = {}
    for case in cases:
        other = by_id.setdefault(case.id, case)
        if other.images != case.images:
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


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if is_image(file) and not file.is_dir())


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
