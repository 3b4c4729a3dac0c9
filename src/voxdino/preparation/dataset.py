"""Read a data set's description in the layout it came in, and read its cases with their geometry checked."""

from pathlib import Path
from typing import Any

import numpy as np

from voxdino.core.errors import DatasetError, GeometryError, VoxdinoError
from voxdino.core.geometry import Grid, format_shape, format_spacing
from voxdino.core.io import read_label_map, read_volume
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.layouts import LAYOUTS
from voxdino.preparation.layouts.nnunet import DESCRIPTION

__all__ = ["Case", "Dataset", "is_dataset", "read_case", "read_dataset", "require_same_grid"]

_DEFAULTS = ReadOptions()
_LONGEST_ID = 200  # bytes: file systems take 255, and suffixes follow


def read_dataset(root: Path, options: ReadOptions = _DEFAULTS, *, labels: LabelSet | None = None) -> Dataset:
    """The data set in a folder (or described by the CSV file given), in the layout its files show.

    labels: what the label values mean, where the layout does not say it or says it wrongly.
    Errors: DatasetError, ConfigError for a bad description; SafetyError for paths that leave the folder.
    """
    root = Path(root).absolute()
    if ".." in root.parts:
        root = root.resolve()
    if root.name == DESCRIPTION:
        root = root.parent
    try:
        is_folder, exists = root.is_dir(), root.exists()
    except OSError as error:  # a name longer than the file system takes
        raise DatasetError(f"cannot be opened ({error.strerror}).", where=root, fix="check the path.") from error
    if not exists:
        raise DatasetError(f"no such folder.{_nearest_folder(root)}", where=root, fix="give the data set's folder.")
    if not is_folder and root.suffix.lower() != ".csv":
        fix = "give the data set's folder, or its CSV file."
        raise DatasetError("is a file, but no description of a data set.", where=root, fix=fix)
    table = None if is_folder else root
    folder = root if is_folder else root.parent
    for recognise, read in LAYOUTS.values():
        if recognise(folder, table):
            dataset = read(folder, table, options, labels)
            _require_cases(dataset)
            return dataset
    found = sorted(path.name for path in folder.iterdir())[:8] if is_folder else [root.name]
    raise DatasetError(
        f"no data set that we know: neither dataset.json nor a CSV file. Found: {', '.join(found) or 'nothing'}.",
        where=root,
        fix="write dataset.json (nnU-Net or MSD layout), or dataset.csv with the columns image,label; or "
        "put images into image/ and their labels, of the same names, into label/.",
    )


def is_dataset(root: Path) -> bool:
    """Whether a folder or a file is laid out as a data set, right or wrong."""
    table = root if root.suffix.lower() == ".csv" else None
    folder = root.parent if root.is_file() else root
    return root.name == DESCRIPTION or any(recognise(folder, table) for recognise, _ in LAYOUTS.values())


def _nearest_folder(root: Path) -> str:
    """A hint at a folder of a like name beside the missing part of the path."""
    missing = root
    while not missing.parent.exists():
        missing = missing.parent
    return nearest(missing.name, (path.name for path in missing.parent.iterdir() if path.is_dir()))


def _require_cases(dataset: Dataset) -> None:
    if not dataset.cases:
        raise DatasetError("no case with a label.", where=dataset.root, fix="add images with their label files.")
    ids = [case.id for case in (*dataset.cases, *dataset.test_cases)]
    for name in ids:
        if "/" in name or name.startswith(".") or not name.isprintable() or len(name.encode()) > _LONGEST_ID:
            fact = f"the case name {name[:80]!r} cannot be part of a file name."
            raise DatasetError(
                fact, where=dataset.root, fix=f"use at most {_LONGEST_ID} bytes, no '/', no leading dot."
            )
    if len(set(ids)) != len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        fix = "name the files apart, or give the CSV a column 'id'."
        raise DatasetError(f"several cases are called {', '.join(twice[:5])}.", where=dataset.root, fix=fix)


def read_case(case: Case, options: ReadOptions, labels: LabelSet | None) -> tuple[Volume, LabelMap | None]:
    """The image of a case, its channel files stacked to (C, *spatial), and its label map, on one grid.

    The label map keeps the file's ids; where `labels` is given, they are checked to be declared.
    Errors: ImageError, GeometryError, LabelError naming the file.
    """
    if case.series is not None:
        options = options.model_copy(update={"series": case.series})
    settings = {"nan_policy": options.nan_policy, "series": options.series}
    volumes = [
        _named(path, read_volume, frames_as_channels=case.frames_as_channels, **settings) for path in case.images
    ]
    first = volumes[0]
    for path, volume in zip(case.images[1:], volumes[1:], strict=True):
        require_same_grid(volume.grid, first.grid, path, case.images[0], options)
    volume = first
    if len(volumes) > 1:
        array = np.concatenate([volume.array for volume in volumes])
        notes = tuple(dict.fromkeys(note for volume in volumes for note in volume.notes))
        volume = Volume(array, first.grid, notes, first.source)
    if case.label is None:
        return volume, None
    label = _named(case.label, read_label_map, options=options, like=case.images[0])
    require_same_grid(label.grid, volume.grid, case.label, case.images[0], options)
    _require_turned_alike(case, volume, label)
    if labels is not None:
        labels.to_indices(label.array, where=case.label)
    return volume, LabelMap(label.array, volume.grid, label.notes, case.label)


def _require_turned_alike(case: Case, volume: Volume, label: LabelMap) -> None:
    """GeometryError unless EXIF tags turn picture and mask by the same: equal shapes do not tell where a mask lies."""
    turned, mask_turned = ({note for note in notes if "EXIF" in note} for notes in (volume.notes, label.notes))
    if turned != mask_turned:
        fact = "its EXIF tag turns the image, its mask has none" if turned else "only its mask is turned by an EXIF tag"
        fact = "EXIF tags turn the image and its mask differently" if turned and mask_turned else fact
        fix = "save both as they lie on each other, without EXIF rotation."
        raise GeometryError(f"{fact}.", where=case.images[0], fix=fix)


def _named(path: Path, read: Any, **settings: Any) -> Any:
    try:
        return read(path, **settings)
    except VoxdinoError as error:
        error.where = error.where or str(path)
        raise


def require_same_grid(grid: Grid, other: Grid, path: Path, other_path: Path, options: ReadOptions) -> None:
    """GeometryError unless two files of a case lie on one grid, within the tolerance of `options`."""
    if grid.shape != other.shape:
        raise GeometryError(
            f"{format_shape(grid.shape)} voxels, but {other_path.name} has {format_shape(other.shape)}.",
            where=path,
            fix="files of one case must share one grid: export it again, or resample it onto the image.",
        )
    if options.trust_array_order or grid.same_as(other, options.geometry_tolerance):
        return
    if grid.orientation != other.orientation:
        fact = f"axes run {grid.orientation}, those of {other_path.name} run {other.orientation}"
    elif not np.allclose(grid.spacing, other.spacing, rtol=1e-3):
        fact = f"spacing is {format_spacing(grid.spacing, grid.unit)}, that of {other_path.name} "
        fact += format_spacing(other.spacing, other.unit)
    else:
        fact = f"lies up to {grid.largest_offset(other):.3g} {grid.unit} away from {other_path.name}"
    raise GeometryError(
        f"{fact} (equal shapes, different affines).",
        where=path,
        fix="correct the header; or allow the offset with --geometry-tol MM; or, if only the header is wrong, "
        "say --trust-array-order.",
    )
