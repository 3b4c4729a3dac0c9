"""The plan: every decision about a data set with the reason beside it, in a file that a person can edit."""

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from pydantic import Field, model_validator

from voxdino.core.errors import ConfigError, DatasetError
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json, read_json, write_json
from voxdino.preparation import decisions
from voxdino.preparation.case import Dataset
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.intensity import ChannelPolicy, choose_channels
from voxdino.preparation.memory import BackboneFacts, BackboneProbe
from voxdino.preparation.orientation import SliceAxis

__all__ = ["DEFAULT_BACKBONE", "ChannelPolicy", "Memory", "Plan", "make_plan"]

DEFAULT_BACKBONE = "dinov3_vits16"
SET_BY_USER = "set by the user"

Memory = Literal["measure", "skip"] | BackboneProbe

_PREPARATION_VERSION = 3  # of the way cases are prepared; raise it when their content changes
_PREPARED_BY = (
    "ndim",
    "labels",
    "channels",
    "slice_axis",
    "in_plane_spacing",
    "crop",
    "context_slices",
    "read_options",
)
_UNPLANNED_BATCH = {"cpu": 8, "cuda": 16}
_CONTEXT = {"neighbours": 1, "slices_3": 1, "slices_5": 2}


class Plan(Record):
    """The decisions; plan.json holds each as {"value": ..., "reason": ...}.

    channels:         the model's channels, in order.
    slice_axis:       world axis that slices are stacked along; None for pictures.
    in_plane_spacing: (row, column) all scans are brought to; None: they keep their pixels. Never resampled along D.
    magnification:    network pixels per prepared voxel.
    crop, tile:       (rows, columns) in prepared voxels, for training and for inference.
    slice_spacing:    median distance of slices, which are never resampled; None where lengths are pixels.
    slab:             slices per training sample.   context_slices: real neighbours each side of it.
    reasons:          field -> why; no part of the digest.
    """

    dataset: str
    fingerprint_digest: str
    ndim: Literal[2, 3]
    labels: LabelSet
    channels: tuple[ChannelPolicy, ...]
    slice_axis: SliceAxis | None
    in_plane_spacing: tuple[float, float] | None
    magnification: float
    crop: tuple[int, int]
    tile: tuple[int, int]
    slice_spacing: float | None = None
    slab: int = 1
    context_slices: int
    input_builder: str
    batch_size: int
    patch_size: int
    num_folds: int = 5
    seed: int = 0
    read_options: ReadOptions = ReadOptions()
    reasons: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_sound(self) -> "Plan":
        if (self.ndim == 2) != (self.slice_axis is None):
            raise ValueError("slice_axis belongs to volumes (ndim 3), and to them only")
        if not self.channels:
            raise ValueError("channels must name one channel at least")
        for name in ("magnification", "slab", "batch_size", "patch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be above 0")
        if min(*self.crop, *self.tile, *(self.in_plane_spacing or (1.0,))) <= 0 or self.context_slices < 0:
            raise ValueError("crop, tile and in_plane_spacing must be above 0, context_slices 0 or more")
        return self

    @property
    def input_size(self) -> tuple[int, int]:
        """Network pixels of a crop: crop * magnification, rounded up to whole patches."""
        rows, columns = (
            max(1, math.ceil(size * self.magnification / self.patch_size - 1e-6)) * self.patch_size
            for size in self.crop
        )
        return rows, columns

    def digest(self) -> str:
        """Of the values; reasons do not count."""
        return digest_json(self.model_dump(mode="json", exclude={"reasons"}))

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """(slice, row, column), in the data set's unit; 1 where it is not known."""
        return (self.slice_spacing or 1.0, *(self.in_plane_spacing or (1.0, 1.0)))

    def preparation_digest(self) -> str:
        """Of the decisions that shape prepared cases: cases of equal digests need not be prepared again."""
        values = self.model_dump(mode="json", include=set(_PREPARED_BY))
        return digest_json({"version": _PREPARATION_VERSION, **values})

    def write(self, path: str | PathLike[str]) -> None:
        """Write plan.json: {"magnification": {"value": 4.0, "reason": "..."}, ...}."""
        values = self.model_dump(mode="json", exclude={"reasons"})
        write_json(path, {name: {"value": v, "reason": self.reasons.get(name, "")} for name, v in values.items()})

    @classmethod
    def read(cls, path: str | PathLike[str]) -> "Plan":
        """Errors: ConfigError naming the key and what was found."""
        found = read_json(path)
        if not isinstance(found, dict):
            raise ConfigError("is no plan: not a JSON object.", where=path, fix="make it again with voxdino prepare.")
        values: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for name, entry in found.items():
            if not isinstance(entry, dict) or "value" not in entry or not set(entry) <= {"value", "reason"}:
                fact = f'\'{name}\' is {str(entry)[:60]}, not {{"value": ..., "reason": ...}}.'
                raise ConfigError(fact, where=path, fix="write the decision so.")
            values[name] = entry["value"]
            reasons[name] = str(entry.get("reason", ""))
        return cls.from_json({**values, "reasons": reasons}, where=path)


def make_plan(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    backbone: str = DEFAULT_BACKBONE,
    settings: Mapping[str, str] | None = None,
    memory: Memory = "measure",
    max_tokens: int | None = None,
) -> Plan:
    """Decide everything about a data set from its facts.

    backbone:   weights file, name of weights, or name of an architecture: its patch size counts, and its memory.
    settings:   decisions made by the user ({"magnification": "3"}); the others follow from them.
    memory:     "measure" runs one training step of the backbone in a child process; a probe started earlier saves the
                seconds that loading torch takes; "skip" takes a small batch.
    max_tokens: per crop; None: 256 on a CPU, 1024 on a GPU.
    Errors: DatasetError when no usable case is left; UsageError for unknown settings; WeightsError.
    """
    if fingerprint.labels is None or not fingerprint.cases:
        fix = "see voxdino check for what is wrong with the cases."
        raise DatasetError("no case with usable labels: nothing to plan for.", where=dataset.root, fix=fix)
    if isinstance(memory, BackboneProbe):
        return _plan_with(fingerprint, dataset, memory, settings or {}, max_tokens, measure=True)
    with BackboneProbe(backbone) as probe:
        return _plan_with(fingerprint, dataset, probe, settings or {}, max_tokens, measure=memory == "measure")


def _plan_with(
    fingerprint: Fingerprint,
    dataset: Dataset,
    probe: BackboneProbe,
    settings: Mapping[str, str],
    max_tokens: int | None,
    *,
    measure: bool,
) -> Plan:
    facts = probe.describe()
    tokens = max_tokens or decisions.MAX_TOKENS[facts.device]
    plan = _decide(fingerprint, dataset, facts, tokens, {})
    if settings:
        wanted = plan.with_settings(settings)  # names and types checked
        forced = {name: getattr(wanted, name) for name in {key.partition(".")[0] for key in settings}}
        plan = _decide(fingerprint, dataset, facts, tokens, forced)
    if "batch_size" in settings or not measure:
        return plan
    num_channels, num_outputs = len(plan.channels), plan.labels.num_outputs
    batch, reason = probe.choose_batch(plan.input_size, plan.input_builder, num_channels, num_outputs, plan.slab)
    return plan.model_copy(update={"batch_size": batch, "reasons": {**plan.reasons, "batch_size": reason}})


def set_by_user(plan: Plan, name: str) -> bool:
    """Whether this value of the plan was given, not planned."""
    return plan.reasons.get(name, "").startswith(SET_BY_USER)


def _decide(
    fingerprint: Fingerprint, dataset: Dataset, backbone: BackboneFacts, max_tokens: int, forced: Mapping[str, Any]
) -> Plan:
    """Every decision in turn; one that is in `forced` is taken as it is, and the later ones follow from it."""
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def take(name: str, decision: tuple[Any, str]) -> Any:
        values[name], reasons[name] = decision
        if name in forced:
            values[name] = forced[name]
            reasons[name] = f"{SET_BY_USER} (planned was {decision[0]}: {decision[1]})"
        return values[name]

    is_ct = any(channel.kind == "ct" for channel in choose_channels(fingerprint, "")[0])
    take("dataset", (fingerprint.dataset, "the data set's own name."))
    take("fingerprint_digest", (fingerprint.digest(), "of the facts that these decisions rest on."))
    take("ndim", (fingerprint.ndim, f"images have {fingerprint.ndim} axes."))
    take("labels", (fingerprint.labels, "declared." if dataset.labels else "the values found in the label files."))
    axis = take("slice_axis", decisions.choose_slice_axis(fingerprint, is_ct=is_ct))
    spacing = take("in_plane_spacing", decisions.choose_spacing(fingerprint, axis))
    builder = take("input_builder", decisions.choose_input_builder(fingerprint, axis))
    take("channels", choose_channels(fingerprint, builder))
    context = _CONTEXT.get(builder, 0)
    take("context_slices", (context, f"the input builder '{builder}' reads {context} each side."))
    patch = take("patch_size", (backbone.patch_size, f"of the backbone {backbone.name}."))
    magnification = take("magnification", decisions.choose_magnification(fingerprint, axis, spacing, patch, max_tokens))
    crop = take("crop", decisions.choose_crop(fingerprint, axis, spacing, magnification, patch, max_tokens))
    take("tile", (crop, "as the crop: what the model saw in training."))
    take("slice_spacing", decisions.find_slice_spacing(fingerprint, axis))
    take("slab", (1, "slices are independent samples."))
    batch = _UNPLANNED_BATCH[backbone.device]
    take("batch_size", (batch, f"memory not measured; a usual size on a {backbone.device} device."))
    folds = len(dataset.splits) if dataset.splits else 5
    take("num_folds", (folds, "the data set comes with its splits." if dataset.splits else "five-fold, as usual."))
    take("seed", (0, "of the splits and of everything random in training."))
    take("read_options", (fingerprint.read_options, "as the data set was checked."))
    return Plan(**values, reasons=reasons)
