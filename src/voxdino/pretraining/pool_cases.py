"""One case of a pool: brought into slices, its intensities scaled, every slice measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from voxdino.core.arrays import ARRAY_SUFFIX, write_array
from voxdino.core.errors import ImageError
from voxdino.core.geometry import Unit
from voxdino.core.io import read_grid
from voxdino.core.io.options import NanPolicy, ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import digest_file, digest_json, write_atomic
from voxdino.core.volume import Volume
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_case
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD, ChannelPolicy, ChannelScaling, names_ct
from voxdino.preparation.made_record import MadeRecord, source_digest, valid_record
from voxdino.preparation.orientation import SliceAxis
from voxdino.preparation.plan import Plan
from voxdino.preparation.prepare import prepare_case
from voxdino.pretraining.pool_slices import PoolConfig, axes_to_cut, choose_slices, measure_slices
from voxdino.pretraining.pool_sources import Modality, is_picture

CT_RANGE = (-1000.0, 1000.0)  # HU; what MedDINOv3's successor clamps CT to (dossier 2.10)

_VERSION = 1  # of the way cases of a pool are made; raise it when their content changes
_MOST_CHANNELS = 32  # frames of a file above which it is a time series
_CHUNK_BYTES = 256 * 1024  # whole slices are added to a chunk up to this size
_CHUNK_ACROSS = (32, 64, 64)  # where a volume is cut along all axes
_HOUNSFIELD = ((-4100.0, -900.0), (-200.0, 4100.0))  # where the 1st and 99th percentile of CT values lie
_LABELS = LabelSet(names=("background", "any"), ids=(0, 1))  # no label is ever read


class PoolCase(MadeRecord):
    """What is known of a case of the pool: <source>/cases/<id>.json, and a line of cases.jsonl.

    slice_axis: world axis of D; None for pictures.   shape: (C, D, H, W) as stored.   spacing: (D, H, W) in `unit`.
    kinds:      per channel "ct", "mr" (and all else), "photo".
    files:      file beside the record -> (SHA-256, bytes).
    """

    id: str
    source: str
    preparation_digest: str
    slice_axis: SliceAxis | None
    shape: tuple[int, int, int, int]
    spacing: tuple[float, float, float]
    unit: Unit
    kinds: tuple[str, ...]
    scaling: tuple[ChannelScaling, ...]
    source_digests: dict[str, str]
    files: dict[str, tuple[str, int]]
    checksum: str = ""

    @property
    def file_digests(self) -> dict[str, str]:
        return {name: digest for name, (digest, _) in self.files.items()}

    @property
    def is_photo(self) -> bool:
        """A colour picture: its channels are one image. Else every channel is a grey image of its own."""
        return self.kinds == ("photo",) * 3

    @property
    def image_name(self) -> str:
        return f"{self.id}.image{ARRAY_SUFFIX}"

    @property
    def facts_name(self) -> str:
        return f"{self.id}.slices.npy"

    @property
    def record_name(self) -> str:
        return f"{self.id}.json"


@dataclass(frozen=True)
class CaseTask:
    """What a worker needs to make one case. folder: where its files go.   axis: None for pictures."""

    case: Case
    source: str
    files: dict[str, Path]
    axis: SliceAxis | None
    modality: Modality
    channels: tuple[str, ...]
    nan_policy: NanPolicy
    config: PoolConfig
    folder: Path

    def preparation_digest(self) -> str:
        """Of everything that shapes the files of the case, the sources apart."""
        return digest_json(
            {
                "version": _VERSION,
                "source": self.source,
                "axis": self.axis,
                "modality": self.modality,
                "channels": self.channels,
                "nan_policy": self.nan_policy,
                "frames_as_channels": self.case.frames_as_channels,
                "axes": self.config.axes,
                "in_plane_spacing": self.config.in_plane_spacing,
            }
        )


@dataclass(frozen=True, eq=False)
class MadeCase:
    """A case whose files are whole. slices: (n, 2) those kept: number of the axis in AXES, place along it."""

    case: PoolCase
    slices: Int[np.ndarray, "n 2"]
    is_kept: bool


def make_case(task: CaseTask) -> MadeCase:
    """Make the files of a case, or keep those of an earlier run where settings, sources and files agree.

    The record is written last: it stands for whole files.
    Errors: as `read_case` and `prepare_case`; ImageError for time series; DatasetError for unreadable files.
    """
    digests = {name: source_digest(path) for name, path in task.files.items()}
    path = task.folder / f"{task.case.id}.json"
    record = valid_record(PoolCase, path, task.preparation_digest(), digests)
    case = record or _write_case(task, digests)
    facts = np.load(task.folder / case.facts_name, allow_pickle=False)
    return MadeCase(case, choose_slices(facts, task.config), is_kept=record is not None)


def _write_case(task: CaseTask, digests: dict[str, str]) -> PoolCase:
    case, folder = task.case, task.folder
    if not is_picture(case):
        _require_few_channels(case)
    volume = grey_of_grey(read_case(case, ReadOptions(nan_policy=task.nan_policy), None)[0])
    policies = choose_policies(volume, task.channels, task.modality, num_files=len(case.images))
    axis = None if volume.grid.ndim == 2 else task.axis or "S"
    prepared = prepare_case(case.id, volume, None, _plan(task, policies, axis, volume.grid.unit))
    image, geometry = prepared.image, prepared.geometry
    shape = (image.shape[0], image.shape[1], image.shape[2], image.shape[3])
    axes = axes_to_cut(axis, volume.grid.spacing, shape[1:], task.config)
    facts = measure_slices(image, prepared.scaling, axis, axes)
    record = PoolCase(
        id=case.id,
        source=task.source,
        preparation_digest=task.preparation_digest(),
        slice_axis=axis,
        shape=shape,
        spacing=geometry.prepared_spacing,
        unit=geometry.unit,
        kinds=tuple(policy.kind for policy in policies),
        scaling=prepared.scaling,
        source_digests=digests,
        files={},
    )
    (folder / record.record_name).unlink(missing_ok=True)
    write_array(folder / record.image_name, image, chunk=_chunk(image, across=len(axes) > 1))
    save_array(folder / record.facts_name, facts)
    names = (record.image_name, record.facts_name)
    files = {name: (digest_file(folder / name), (folder / name).stat().st_size) for name in names}
    record = record.model_copy(update={"files": files}).sealed()
    record.write(folder / record.record_name)
    return record


def _require_few_channels(case: Case) -> None:
    _, channels = read_grid(case.images[0])
    if channels > _MOST_CHANNELS:
        fact = f"has {channels} frames or channels: a time series, nearly the same image again and again."
        raise ImageError(fact, where=case.images[0], fix="extract the frames that differ, or leave the file out.")


def grey_of_grey(volume: Volume) -> Volume:
    """A grey picture that was stored as colour gets its one channel back; all else stays as it is."""
    array = volume.array
    is_grey = volume.grid.ndim == 2 and len(array) == 3 and bool((array[1:] == array[0]).all())
    return Volume(array[:1], volume.grid, volume.notes, volume.source) if is_grey else volume


def choose_policies(
    volume: Volume, names: tuple[str, ...], modality: Modality, *, num_files: int = 1
) -> tuple[ChannelPolicy, ...]:
    """How the values of each channel are scaled (dossier 2.10, FlexiCT; 7.4).

    Colour pictures: by ImageNet's mean and sd, as the backbone was trained. CT: clamped to -1000 to 1000 HU, on one
    scale for all scans, on which it looks like a grey photograph (Hounsfield units keep their meaning). All else: each
    case clipped to its own 0.5 and 99.5 percentiles and z-scored.
    """
    array = volume.array
    is_colour = volume.grid.ndim == 2 and len(array) == 3 and num_files == 1 and array.dtype.kind == "u"
    if is_colour:
        most = float(np.iinfo(array.dtype).max)
        return tuple(
            ChannelPolicy(name=name, source=n, kind="photo", lower=0.0, upper=most, mean=most * mean, sd=most * sd)
            for n, (name, mean, sd) in enumerate(zip(("red", "green", "blue"), IMAGENET_MEAN, IMAGENET_SD, strict=True))
        )
    known = names if len(names) == len(array) else (None,) * len(array)
    return tuple(
        _ct_policy(n) if _is_ct(channel, name, modality) else ChannelPolicy(name=name or str(n), source=n, kind="mr")
        for n, (channel, name) in enumerate(zip(array, known, strict=True))
    )


def _ct_policy(source: int) -> ChannelPolicy:
    lower, upper = CT_RANGE
    grey_mean, grey_sd = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_SD) / 3
    return ChannelPolicy(
        name="CT",
        source=source,
        kind="ct",
        lower=lower,
        upper=upper,
        mean=lower + grey_mean * (upper - lower),
        sd=grey_sd * (upper - lower),
    )


def _is_ct(values: NDArray[Any], name: str | None, modality: Modality) -> bool:
    """A channel called CT whose values never fall below 0 was windowed or shifted: its units are not Hounsfield's."""
    if modality != "auto":
        return modality == "ct"
    if name is not None:
        return names_ct(name) and float(values.min()) < 0
    sample = values.reshape(-1)[:: max(1, values.size // 1_000_000)]
    return all(
        low <= found <= high
        for found, (low, high) in zip(np.percentile(sample, (1, 99)).tolist(), _HOUNSFIELD, strict=True)
    )


def _plan(task: CaseTask, policies: tuple[ChannelPolicy, ...], axis: SliceAxis | None, unit: Unit) -> Plan:
    """The plan that `prepare_case` follows; what it says about models is not used."""
    side = task.config.in_plane_spacing
    return Plan(
        dataset=task.source,
        fingerprint_digest="",
        ndim=2 if axis is None else 3,
        labels=_LABELS,
        channels=policies,
        slice_axis=axis,
        in_plane_spacing=None if side is None or unit == "px" else (side, side),
        magnification=1.0,
        crop=(1, 1),
        tile=(1, 1),
        context_slices=0,
        input_builder="repeat",
        batch_size=1,
        patch_size=16,
    )


def _chunk(image: NDArray[Any], *, across: bool) -> tuple[int, ...]:
    """The read unit of (C, D, H, W): whole slices, or blocks where slices are cut along all axes."""
    if across:
        return (image.shape[0], *_CHUNK_ACROSS)
    slice_bytes = image[:, 0].size * image.dtype.itemsize
    return (image.shape[0], max(1, _CHUNK_BYTES // slice_bytes), *image.shape[2:])


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file atomically."""
    with write_atomic(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
