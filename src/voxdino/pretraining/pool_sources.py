"""Where the images of a pool come from: data sets in a layout we know, tables, folder trees of any shape, single files.

Labels are never wanted. What lies in the tree and is no image of the pool is left aside, and said so.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import Field

from voxdino.core.errors import ConfigError, DatasetError, InputError, ResourceError
from voxdino.core.io import DICOM_SUFFIXES, image_suffix, is_image, is_scan, read_grid
from voxdino.core.io.options import NanPolicy, ReadOptions
from voxdino.core.io.pictures import SUFFIXES as PICTURE_SUFFIXES
from voxdino.core.records import Record, nearest
from voxdino.core.safe_files import digest_bytes
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.decisions import choose_slice_axis
from voxdino.preparation.fingerprint import CaseFacts, Fingerprint, medians_by_axis
from voxdino.preparation.intensity import names_ct
from voxdino.preparation.layouts import LAYOUTS
from voxdino.preparation.orientation import SliceAxis
from voxdino.preparation.scans import cases_of_scan
from voxdino.preparation.workers import run_over_cases

Modality = Literal["auto", "ct", "other"]

NEARLY_ISOTROPIC = 1.5  # longest side of a voxel over its shortest, up to which other planes look like the scanner's

_LABEL_WORD = r"(?:^|[_\-. ])(?:labels?(?:tr|ts|val)?|masks?|segs?|segmentations?|gt|ground[_-]?truth|annotations?)\d*"
_LABEL_FOLDER = re.compile(rf"{_LABEL_WORD}$", re.IGNORECASE)  # a folder may bear the name of a challenge: only the end
_LABEL_FILE = re.compile(rf"{_LABEL_WORD}(?:$|[_\-. ])", re.IGNORECASE)
_LONGEST_ID = 150  # bytes of a case's name in the pool
_HEADER_BYTES = 4096  # what looking at a header costs, as `run_over_cases` counts
_MOST_TOLD = 3


class PoolSource(Record):
    """One data set, folder or file of a pool.

    path:      a data set's folder (nnU-Net, MSD, CSV), a CSV file, any tree of images, or one image.
    weight:    how often each of its slices is drawn, against the slices of other sources.
    modality:  "ct": values are Hounsfield units; "other": they are not; "auto": as the description's channel names
               say, else CT where the values look like Hounsfield units.
    leave_out: patterns of case names ("case_01*") that stay out of the pool: those one will test on.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)
    path: str
    weight: float = Field(default=1.0, gt=0)
    modality: Modality = "auto"
    nan_policy: NanPolicy = "refuse"
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundImages:
    """The images of a source. cases: sorted by id, without labels.   channels: names, where a description gives them.

    notes:     what was left aside, one sentence each.
    unmatched: patterns of `leave_out` that no case here matches.
    """

    source: PoolSource
    root: Path
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    notes: tuple[str, ...]
    unmatched: tuple[str, ...] = ()

    def name_of(self, path: Path) -> str:
        """A file's name in records: relative to the root."""
        return Path(os.path.relpath(path, self.root)).as_posix()


def require_apart(sources: Sequence[PoolSource]) -> None:
    """Errors: ConfigError for no source, for two of one name, and for a place given twice."""
    if not sources:
        raise ConfigError("the pool has no source.", fix="name a data set or a folder of images.")
    names: dict[str, str] = {}
    places: dict[Path, str] = {}
    for source in sources:
        if source.name.casefold() in names:  # folders of one name on some file systems
            fact = f"two sources are called {source.name!r} (capitals do not count)."
            raise ConfigError(fact, where=source.path, fix="give each source a name of its own.")
        names[source.name.casefold()] = source.name
        place = Path(source.path).resolve()
        if place in places:
            fact = f"the sources {places[place]!r} and {source.name!r} are one place."
            raise ConfigError(fact, where=source.path, fix="give it once, with a higher weight.")
        places[place] = source.name


def find_images(source: PoolSource, *, skip: Path) -> FoundImages:
    """List the images of a source; none is opened. skip: a folder of ours that is never looked into.

    A folder whose description cannot be used (labels missing, a CSV file about something else) is taken as a plain
    tree, with a note. In plain trees what is named like labels ("masks/", "case_seg.nii.gz") is left aside.

    Errors: DatasetError where there is no image; ConfigError for a `leave_out` that leaves none; SafetyError for
    descriptions that leave their folder.
    """
    path = Path(source.path).absolute()
    if not path.exists():
        known = (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise DatasetError(f"no such file or folder.{nearest(path.name, known)}", where=path, fix="check the path.")
    if path.is_dir():
        found = _read_folder(source, path, skip)
    elif path.suffix.lower() == ".csv":
        dataset = read_dataset_files(path.parent, path)
        assert dataset is not None, "a named table is always recognised"
        found = _of_dataset(source, dataset)
    else:
        found = FoundImages(source, path.parent, (Case(path.name, (path,), None, frames_as_channels=True),), (), ())
    if not found.cases:
        aside = f" ({' '.join(found.notes)})" if found.notes else ""
        fix = "give a folder that holds images (.nii.gz, .nrrd, .mha, .png ...)."
        raise DatasetError(f"holds no image for the pool{aside}.", where=path, fix=fix)
    return _without_left_out(_with_safe_ids(found))


def _read_folder(source: PoolSource, folder: Path, skip: Path) -> FoundImages:
    try:
        dataset = read_dataset_files(folder, None)
    except InputError as error:
        found = _walk_tree(source, folder, skip)
        note = f"the description was not used, all images below the folder were taken ({error.fact.rstrip('.')})."
        return replace(found, notes=(note, *found.notes))
    return _walk_tree(source, folder, skip) if dataset is None else _of_dataset(source, dataset)


def read_dataset_files(folder: Path, table: Path | None) -> Dataset | None:
    """As `read_dataset`, but a data set may be without a single label; None: the folder has no layout that we know."""
    for recognise, read in LAYOUTS.values():
        if recognise(folder, table):
            return read(folder, table, ReadOptions(), None)
    return None


def _of_dataset(source: PoolSource, dataset: Dataset) -> FoundImages:
    cases = tuple(replace(case, label=None) for case in (*dataset.cases, *dataset.test_cases))
    return FoundImages(source, dataset.root, cases, dataset.channels, ())


def _walk_tree(source: PoolSource, root: Path, skip: Path) -> FoundImages:
    """Every image below a folder but what is named like labels; linked folders are followed, each once."""
    images: list[Path] = []
    labels: list[Path] = []
    others: Counter[str] = Counter()
    scans: dict[Path, None] = {}  # folders with DICOM files, the highest ones
    for path, is_label in _files_below(root, skip.resolve()):
        is_image_file = is_image(path) and image_suffix(path) not in DICOM_SUFFIXES
        if not is_image_file and path.suffix.lower() != ".zip" and is_scan(path):
            if not any(parent in scans for parent in path.parents):
                scans[path.parent] = None
        elif not is_image_file:
            others[path.suffix.lower() or "no suffix"] += 1
        elif is_label or _LABEL_FILE.search(path.name[: len(path.name) - len(image_suffix(path))]):
            labels.append(path)
        else:
            images.append(path)
    notes = []
    if labels:
        told = ", ".join(os.path.relpath(path, root) for path in labels[:_MOST_TOLD])
        more = " ..." if len(labels) > _MOST_TOLD else "."
        notes.append(f"images named like labels were left aside: {len(labels)} ({told}){more}")
    if others:
        told = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(_MOST_TOLD))
        notes.append(f"files of other kinds were left aside: {told}.")
    cases = [Case(os.path.relpath(path, root), (path,), None, frames_as_channels=True) for path in images]
    for folder in scans:
        cases += cases_of_scan(folder, name=os.path.relpath(folder, root) if folder != root else root.name)
    return FoundImages(source, root, tuple(cases), (), tuple(notes))


def _files_below(root: Path, skip: Path) -> Iterator[tuple[Path, bool]]:
    """(file, whether a folder above it is named like labels), in the order of names; hidden ones are not seen."""
    visited: set[tuple[int, int]] = set()
    label_folders: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        status = Path(folder).stat()
        is_ours = Path(folder) != root and Path(folder).resolve() == skip
        if (status.st_dev, status.st_ino) in visited or is_ours:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        is_label = folder in label_folders
        label_folders.update(
            str(Path(folder) / name) for name in folders if is_label or _LABEL_FOLDER.search(name) is not None
        )
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder) / name, is_label


def _refuse(error: OSError) -> None:
    fact = f"cannot be listed ({error.strerror})."
    raise ResourceError(fact, where=error.filename, fix="check the permissions of the folder.") from error


def _with_safe_ids(found: FoundImages) -> FoundImages:
    """Case names that can be file names, each once: those that had to be changed too much, or clash, get a digest."""
    wanted = [_safe_name(case) for case in found.cases]
    clashes = Counter(name.casefold() for name in wanted)
    named = []
    for case, name in zip(found.cases, wanted, strict=True):
        if clashes[name.casefold()] > 1 or len(name.encode()) > _LONGEST_ID:
            short = name.encode()[:_LONGEST_ID].decode("utf-8", "ignore")
            whole = " ".join([case.id, *(found.name_of(path) for path in case.images)])
            name = f"{short}-{digest_bytes(whole.encode('utf-8', 'surrogateescape'))[:12]}"
        named.append(replace(case, id=name))
    return replace(found, cases=tuple(sorted(named, key=lambda case: case.id)))


def _safe_name(case: Case) -> str:
    stem = case.id[: len(case.id) - len(image_suffix(case.id))] or case.id
    text = "".join(letter if letter.isprintable() and letter not in "/\\" else "_" for letter in stem)
    return f"_{text[1:]}" if text.startswith(".") else text


def _without_left_out(found: FoundImages) -> FoundImages:
    cases = found.cases
    patterns = found.source.leave_out
    unmatched = tuple(one for one in patterns if not any(fnmatchcase(case.id, one) for case in cases))
    for pattern in patterns:
        kept = tuple(case for case in cases if not fnmatchcase(case.id, pattern))
        if not kept:
            fact = f"leave_out {pattern!r} leaves no case of the source {found.source.name!r}."
            raise ConfigError(fact, where=found.root, fix="leave out fewer cases, or drop the source.")
        cases = kept
    num_out = len(found.cases) - len(cases)
    notes = (*found.notes, f"{num_out} cases were left out by name.") if num_out else found.notes
    return replace(found, cases=cases, notes=notes, unmatched=unmatched)


def require_matches(found: Sequence[FoundImages]) -> None:
    """Errors: ConfigError for a `leave_out` that matches no case of any source it was given for."""
    for one in found:
        for pattern in one.unmatched:
            if all(pattern in other.unmatched for other in found if pattern in other.source.leave_out):
                fact = f"leave_out {pattern!r} matches no case of the pool."
                raise ConfigError(fact, where=one.root, fix=f"case names look like {one.cases[0].id!r}.")


def choose_axes(found: FoundImages, num_workers: int | None) -> tuple[SliceAxis | None, ...]:
    """Per case, the axis its slices are stacked along, from the headers alone; None for pictures and unreadable files.

    A clearly anisotropic scan is cut as it was taken; the others all along one axis, as a plan for the source would.
    """
    volumes = [n for n, case in enumerate(found.cases) if not is_picture(case)]
    names, sizes = [found.cases[n].id for n in volumes], [_HEADER_BYTES] * len(volumes)
    facts: dict[int, CaseFacts] = {}
    cases = [found.cases[n] for n in volumes]
    with closing(run_over_cases(_read_facts, cases, names, num_workers=num_workers, sizes=sizes)) as outcomes:
        for outcome in outcomes:
            if outcome.value is not None and outcome.value.ndim == 3:
                facts[volumes[outcome.index]] = outcome.value
    if not facts:
        return (None,) * len(found.cases)
    is_ct = found.source.modality == "ct" or any(names_ct(name) for name in found.channels)
    common = _choose_axis([facts[n] for n in sorted(facts)], is_ct)
    return tuple(_own_axis(facts[n], is_ct) or common if n in facts else None for n in range(len(found.cases)))


def is_picture(case: Case) -> bool:
    return image_suffix(case.images[0]) in PICTURE_SUFFIXES


def _read_facts(case: Case) -> CaseFacts:
    """Shape, spacing and orientation of a volume, from its header."""
    grid, _ = read_grid(case.images[0], series=case.series)
    return CaseFacts(
        id=case.id,
        shape=grid.shape,
        spacing=grid.spacing,
        orientation=grid.orientation if grid.ndim == 3 else "",
        unit=grid.unit,
        dtype="",
        sources={},
        num_voxels={},
        structures={},
        intensity=(),
        foreground=(),
    )


def _own_axis(facts: CaseFacts, is_ct: bool) -> SliceAxis | None:
    """The axis that a case asks for by itself: along which it has one slice, or its voxels are longest."""
    single = [axis for axis, size in facts.along_world(facts.shape).items() if size == 1]
    axes: dict[str, SliceAxis] = {"S": "S", "A": "A", "R": "R"}
    if len(single) == 1:
        return axes[single[0]]
    *_, second, coarsest = sorted(facts.spacing)
    return _choose_axis([facts], is_ct) if coarsest > NEARLY_ISOTROPIC * second else None


def _choose_axis(cases: list[CaseFacts], is_ct: bool) -> SliceAxis | None:
    fingerprint = Fingerprint(
        dataset="",
        layout="folder",
        channels=(),
        num_channels=1,
        labels=None,
        read_options=ReadOptions(),
        cases=tuple(cases),
        median_shape=medians_by_axis(cases, [case.shape for case in cases]),
        median_spacing=medians_by_axis(cases, [case.spacing for case in cases]),
        anisotropy=None,
        structures={},
        foreground=(),
    )
    return choose_slice_axis(fingerprint, is_ct=is_ct)[0]
