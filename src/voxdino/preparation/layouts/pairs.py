"""Two folders side by side, one with images, one with label files of the same names: `image/7.png`, `label/7.png`.

How many sets are published without any description: what the label values mean is found by the survey, folds are drawn.
"""

from pathlib import Path

from voxdino.core.errors import DatasetError
from voxdino.core.io import is_image
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.layouts.description import NamedFiles, list_folder, stem_of, tell_names

IMAGES, LABELS = ("image", "images"), ("label", "labels", "mask", "masks")


def recognise(folder: Path, table: Path | None) -> bool:
    return table is None and all(_find(folder, names) for names in (IMAGES, LABELS))


def read(folder: Path, table: Path | None, options: ReadOptions, labels: LabelSet | None) -> Dataset:
    """Images without a label file are test cases. Errors: DatasetError for labels without an image, two of one name."""
    files = NamedFiles(folder, options, folder)
    images, masks = (_by_stem(folder, _find(folder, names), files) for names in (IMAGES, LABELS))
    if alone := sorted(masks.keys() - images.keys()):
        fact = f"labels without an image of the same name: {tell_names(alone)}."
        raise DatasetError(fact, where=folder, fix="give both the same name.")
    cases = [Case(name, (images[name],), masks.get(name)) for name in sorted(images)]
    return Dataset(
        root=folder,
        name=folder.name,
        layout="pairs",
        channels=(),
        labels=labels,
        cases=tuple(case for case in cases if case.label is not None),
        test_cases=tuple(case for case in cases if case.label is None),
        splits=None,
        options=options,
    )


def _find(folder: Path, names: tuple[str, ...]) -> str:
    """The one of these folders that is there; "" where none is, or several are."""
    found = [name for name in names if (folder / name).is_dir()]
    return found[0] if len(found) == 1 else ""


def _by_stem(folder: Path, name: str, files: NamedFiles) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in list_folder(folder / name):
        if not is_image(folder / name / entry):
            continue
        path = files.find(f"{name}/{entry}")
        if (stem := stem_of(path)) in found:
            fact = f"{entry} and {found[stem].name} are both '{stem}'."
            raise DatasetError(fact, where=folder / name, fix="keep one of them.")
        found[stem] = path
    return found
