"""Which cases to predict: from files, folders of files, or a data set."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from voxdino.core.errors import DatasetError, UsageError
from voxdino.core.io import image_suffix, is_image
from voxdino.core.io.options import ReadOptions
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_dataset

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def find_cases(inputs: Sequence[Path], options: ReadOptions | None = None) -> list[Case]:
    """The cases of image files, of folders of image files, and of data sets (their test cases, or all if none).

    Files CASE_0000, CASE_0001, ... of one folder are the channels of one case, as in nnU-Net; any other file is a case
    of its own. Errors: DatasetError for a path that is not there or holds no image; UsageError for equal case ids.
    """
    cases: list[Case] = []
    for path in inputs:
        if path.is_file():
            cases += group_channels([path])
        elif path.is_dir() and (path / "dataset.json").is_file():
            dataset = read_dataset(path, options or ReadOptions())
            cases += dataset.test_cases or dataset.cases
        elif path.is_dir():
            found = group_channels(sorted(file for file in path.iterdir() if file.is_file() and is_image(file)))
            if not found:
                raise DatasetError("holds no image.", where=path, fix="give a folder of images, or image files.")
            cases += found
        else:
            raise DatasetError("no such file or folder.", where=path, fix="check the path.")
    ids = [case.id for case in cases]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise UsageError(f"several inputs are called {', '.join(twice[:5])}.", fix="predict them in separate calls.")
    return cases


def group_channels(files: Iterable[Path]) -> list[Case]:
    """Cases of image files, sorted by id. A single file whose name ends in _0000 brings its other channels along."""
    channels: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        stem, suffix = _split(file)
        match = _CHANNEL.fullmatch(stem)
        if match is None:
            channels[(file.parent, stem)] = [file]
            continue
        group = channels.setdefault((file.parent, match[1]), [])
        if not group:
            beside = (path for path in file.parent.iterdir() if path.name.endswith(suffix))
            group += sorted(path for path in beside if re.fullmatch(re.escape(match[1]) + r"_\d{4}", _split(path)[0]))
    return sorted((Case(name, tuple(group), None) for (_, name), group in channels.items()), key=lambda case: case.id)


def _split(file: Path) -> tuple[str, str]:
    suffix = image_suffix(file)
    return file.name[: len(file.name) - len(suffix)], suffix
