"""One case of a pool: brought into slices, its intensities scaled, every slice measured; then, which slices are kept.

Measurements are facts and stay with the case; what is kept is decided from them, so that other thresholds cost nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field

from voxdino.core.arrays import ARRAY_SUFFIX, write_array
from voxdino.core.errors import DatasetError, ImageError, VoxdinoError
from voxdino.core.geometry import Unit
from voxdino.core.io import read_grid
from voxdino.core.io.options import NanPolicy, ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.resample import resize_linear
from voxdino.core.safe_files import digest_file, digest_json, write_atomic
from voxdino.core.volume import Volume
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_case
from voxdino.preparation.intensity import IMAGENET_MEAN, IMAGENET_SD, ChannelPolicy, ChannelScaling, names_ct
from voxdino.preparation.orientation import DISPLAY_AXES, SliceAxis
from voxdino.preparation.plan import Plan
from voxdino.preparation.prepare import prepare_case
from voxdino.pretraining.pool_sources import NEARLY_ISOTROPIC, Modality, is_picture

AXES: tuple[SliceAxis | None, ...] = (None, "S", "A", "R")  # number in the index -> axis; None: a picture
CT_RANGE = (-1000.0, 1000.0)  # HU; what MedDINOv3's successor clamps CT to (dossier 2.10)
THUMBNAIL = 32  # pixels of a side
SLICE_FACTS = np.dtype(
    [("axis", "u1"), ("slice", "<i4"), ("foreground", "<f4"), ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL))]
)

_VERSION = 1  # of the way cases of a pool are made; raise it when their content changes
_NOTHING = 0.05  # of the case's intensity range: air, the black around a patient
_SMALLEST_SIDE = 16  # voxels; planes across a volume are no pictures below
_MOST_CHANNELS = 32  # frames of a file above which it is a time series
_CHUNK_BYTES = 256 * 1024  # whole slices are added to a chunk up to this size
_CHUNK_ACROSS = (32, 64, 64)  # where a volume is cut along all axes
_BLOCK_VALUES = 1 << 23  # measured together
_HOUNSFIELD = ((-4100.0, -900.0), (-200.0, 4100.0))  # where the 1st and 99th percentile of CT values lie
_LABELS = LabelSet(names=("background", "any"), ids=(0, 1))  # no label is ever read


class PoolConfig(Record):
    """Which slices are made of the images, and which of those are kept.

    axes:             "plan": along the axis that a plan would choose; "all": nearly isotropic volumes along all three.
    in_plane_spacing: mm that the pixels of all slices get; None, or no spacing in the file: they stay as they are.
    min_foreground:   least share of a slice that is not air or black border. A slice without any is never kept.
    max_similarity:   a slice is dropped whose 32 x 32 thumbnail correlates more than this with the last slice kept
                      before it; None: all are kept. 0.995 keeps one slice in about 6 mm of a trunk CT.
    """

    axes: Literal["plan", "all"] = "plan"
    in_plane_spacing: float | None = Field(default=None, gt=0)
    min_foreground: float = Field(default=0.05, ge=0, le=1)
    max_similarity: float | None = Field(default=0.995, gt=0, le=1)


class PoolCase(Record):
    """What is known of a case of the pool: <source>/cases/<id>.json, and a line of cases.jsonl.

    slice_axis: world axis of D; None for pictures.   shape: (C, D, H, W) as stored.   spacing: (D, H, W) in `unit`.
    kinds:      per channel "ct", "mr" (and all else), "photo".
    source_digests: source file -> SHA-256.   files: file beside the record -> (SHA-256, bytes).
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

    def sealed(self) -> "PoolCase":
        return self.model_copy(update={"checksum": self._content_digest()})

    @property
    def is_whole(self) -> bool:
        """Nothing has changed since it was sealed."""
        return self.checksum == self._content_digest()

    def _content_digest(self) -> str:
        return digest_json(self.model_dump(mode="json", exclude={"checksum"}))


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
    digests = {name: _digest_source(path) for name, path in task.files.items()}
    record = _valid_record(task, digests)
    case = record or _write_case(task, digests)
    facts = np.load(task.folder / case.facts_name, allow_pickle=False)
    return MadeCase(case, choose_slices(facts, task.config), is_kept=record is not None)


def _digest_source(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        fact = f"cannot be read ({error.strerror})."
        raise DatasetError(fact, where=path, fix="restore the file, or remove it.") from error


def _valid_record(task: CaseTask, digests: dict[str, str]) -> PoolCase | None:
    path = task.folder / f"{task.case.id}.json"
    if not path.exists():
        return None
    try:
        record = PoolCase.read(path)
        is_valid = (
            record.is_whole
            and record.preparation_digest == task.preparation_digest()
            and record.source_digests == digests
            and all(digest_file(path.with_name(name)) == digest for name, (digest, _) in record.files.items())
        )
    except (VoxdinoError, OSError):
        return None
    return record if is_valid else None


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


def axes_to_cut(
    axis: SliceAxis | None, spacing: tuple[float, ...], shape: tuple[int, int, int], config: PoolConfig
) -> tuple[SliceAxis | None, ...]:
    """The axes that a case (D, H, W) is cut along. spacing: of the file, before anything was resampled."""
    is_cubic = axis is not None and max(spacing) <= NEARLY_ISOTROPIC * min(spacing) and min(shape) >= _SMALLEST_SIDE
    if config.axes == "plan" or axis is None or not is_cubic:
        return (axis,)
    return (axis, *(other for other in AXES if other is not None and other != axis))


def turn_slices(
    stacked: SliceAxis | None, axis: SliceAxis | None
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """(order, flips) that bring (D, H, W) with slices along `stacked` to slices along `axis`, as a reader sees them.

    As `orientation.slice_geometry` would lay them: S runs up from slice to slice, and down within a slice.
    """
    if stacked is None or axis is None or stacked == axis:
        return (0, 1, 2), (False, False, False)
    held, wanted = DISPLAY_AXES[stacked], DISPLAY_AXES[axis]
    depth, rows, columns = (held.index(world) for world in wanted)
    turns = (stacked == "S") != (axis == "S")
    return (depth, rows, columns), (turns and wanted[0] == "S", turns and wanted[1] == "S", False)


def measure_slices(
    image: NDArray[Any],
    scaling: tuple[ChannelScaling, ...],
    stacked: SliceAxis | None,
    axes: tuple[SliceAxis | None, ...],
) -> NDArray[Any]:
    """SLICE_FACTS of every slice of a case (C, D, H, W) along each of `axes`: share of foreground, thumbnail."""
    parts = []
    for axis in axes:
        order, flips = turn_slices(stacked, axis)
        turned = image.transpose(0, *(1 + place for place in order))
        turned = np.flip(turned, tuple(1 + place for place, flip in enumerate(flips) if flip))
        facts = np.zeros(turned.shape[1], dtype=SLICE_FACTS)
        facts["axis"], facts["slice"] = AXES.index(axis), np.arange(len(facts))
        step = max(1, _BLOCK_VALUES // max(1, turned[:, 0].size))
        for start in range(0, len(facts), step):
            shown = _in_range(turned[:, start : start + step], scaling)  # (C, d, H, W)
            block = facts[start : start + step]
            block["foreground"] = (shown > _NOTHING).any(axis=0).mean(axis=(1, 2))
            small = resize_linear(shown.mean(axis=0), (THUMBNAIL, THUMBNAIL), (1, 2))
            block["thumbnail"] = np.rint(255 * small.clip(0, 1)).astype(np.uint8)
        parts.append(facts)
    return np.concatenate(parts)


def _in_range(image: NDArray[Any], scaling: tuple[ChannelScaling, ...]) -> NDArray[np.float32]:
    """(C, ...) file values as 0 to 1 of each channel's range; a constant channel is 0."""
    shown = np.empty((len(scaling), *image.shape[1:]), dtype=np.float32)
    for channel, rule in zip(shown, scaling, strict=True):
        np.clip(image[rule.source].astype(np.float32), rule.lower, rule.upper, out=channel)
        channel -= np.float32(rule.lower)
        channel /= np.float32(rule.upper - rule.lower) or np.float32(1)
    return shown


def choose_slices(facts: NDArray[Any], config: PoolConfig) -> Int[np.ndarray, "n 2"]:
    """(n, 2) int32 of the SLICE_FACTS that are kept: number of the axis, place along it."""
    kept = []
    is_full = (facts["foreground"] > 0) & (facts["foreground"] >= config.min_foreground)
    for axis in sorted(set(facts["axis"].tolist())):
        rows = np.flatnonzero(is_full & (facts["axis"] == axis))
        patterns = _patterns(facts["thumbnail"][rows])
        last = None
        for row, pattern in zip(rows.tolist(), patterns, strict=True):
            if last is None or config.max_similarity is None or float(pattern @ last) <= config.max_similarity:
                kept.append((axis, int(facts["slice"][row])))
                last = pattern
    return np.array(kept, dtype=np.int32).reshape(-1, 2)


def _patterns(thumbnails: NDArray[Any]) -> Float[np.ndarray, "n E"]:
    """Vectors whose products are the correlations of thumbnails (n, h, w); two constant ones correlate fully."""
    flat = thumbnails.reshape(-1, THUMBNAIL * THUMBNAIL).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    is_constant = lengths == 0
    return np.hstack([flat / np.where(is_constant, 1, lengths), is_constant]).astype(np.float32)


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
