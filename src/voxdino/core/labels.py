"""What the numbers in label maps mean, and the way from those numbers to class indices and back."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError, model_validator

from voxdino.core.errors import DatasetError, LabelError
from voxdino.core.records import Record

IGNORE_INDEX = 255  # class index of voxels that neither train nor count, where there are fewer than 255 classes
WIDE_IGNORE_INDEX = 65535  # the same where there are more

LabelKind = Literal["single", "multi", "ordinal"]  # of cases: one class of many, any number of them, classes in order

_BLOCK = 1 << 20  # voxels looked up at a time: fancy indexing makes 8-byte copies of what it is given
_MAX_TOLD = 8  # undeclared values named in a message


class Region(Record):
    """A union of label ids that is one output of the model ("whole tumour": 1, 2, 3)."""

    name: str
    ids: tuple[int, ...]


class LabelSet(Record):
    """Classes of a data set: names and the ids that stand for them in files. A class's index is its position.

    names, ids:  background first; ids are any non-negative integers, gaps allowed.
    ignore_id:   the id of voxels that neither train nor count.
    regions:     overlapping outputs in place of classes (nnU-Net); empty for plain classes.
    region_ids:  the id to write for each region; where regions overlap, the later one wins.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    ignore_id: int | None = None
    regions: tuple[Region, ...] = ()
    region_ids: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> "LabelSet":
        if len(self.names) != len(self.ids):
            raise ValueError(f"{len(self.names)} names for {len(self.ids)} ids")
        if len(self.ids) < 2:
            raise ValueError("a label set needs background and one class at least")
        if len(self.ids) > WIDE_IGNORE_INDEX - 1:
            raise ValueError(f"{len(self.ids)} classes; {WIDE_IGNORE_INDEX - 1} are the most")
        for what, values in (("name", self.names), ("id", self.ids)):
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"the {what} {twice[0]} is given twice")
        if min(self.ids) < 0:
            raise ValueError(f"the id {min(self.ids)} is negative")
        if self.ignore_id is not None and (self.ignore_id in self.ids or self.ignore_id < 0):
            raise ValueError(f"the ignore id {self.ignore_id} is negative, or a class has it too")
        if len(self.regions) != len(self.region_ids):
            raise ValueError(f"{len(self.regions)} regions, but {len(self.region_ids)} ids to write for them")
        unknown = sorted({i for region in self.regions for i in region.ids} | set(self.region_ids) - {0})
        unknown = [i for i in unknown if i not in self.ids]
        if unknown:
            raise ValueError(f"regions name the id {unknown[0]}, which no class has")
        return self

    @classmethod
    def from_nnunet(
        cls,
        labels: Mapping[str, Any],
        regions_class_order: Sequence[int] | None = None,
        *,
        where: str | PathLike[str] | None = None,
    ) -> "LabelSet":
        """The label set of an nnU-Net dataset.json: name -> id, or name -> list of ids for regions.

        Errors: DatasetError for ids that are no whole numbers, no background, doubles, regions without an order.
        """
        members = {name: _as_ids(name, value, where) for name, value in labels.items()}
        ignore = members.pop("ignore", None)
        background = members.pop("background", None)
        if background is None or len(background) != 1 or (ignore is not None and len(ignore) != 1):
            fact = "labels need 'background' with one id (and 'ignore', where used, one id)."
            raise DatasetError(fact, where=where, fix='write "background": 0 in "labels".')
        has_regions = any(len(ids) != 1 for ids in members.values())
        single = {ids[0]: name for name, ids in members.items() if len(ids) == 1}
        foreground = list(dict.fromkeys(i for ids in members.values() for i in ids)) if has_regions else list(single)
        if has_regions:
            foreground.sort()
            if regions_class_order is None or len(regions_class_order) != len(members):
                fact = f"labels are regions, so regions_class_order needs {len(members)} ids."
                raise DatasetError(fact, where=where, fix='add "regions_class_order", one id per region, in order.')
        elif len(single) != len(members):
            raise DatasetError("two labels have the same id.", where=where, fix="give every label its own id.")
        foreground = [i for i in foreground if i != background[0]]
        try:
            return cls(
                names=("background", *(single.get(i, f"label {i}") for i in foreground)),
                ids=(background[0], *foreground),
                ignore_id=ignore[0] if ignore else None,
                regions=tuple(Region(name=n, ids=ids) for n, ids in members.items()) if has_regions else (),
                region_ids=tuple(regions_class_order or ()) if has_regions else (),
            )
        except ValidationError as error:
            fact = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise DatasetError(f"labels: {fact}.", where=where, fix='correct "labels".') from None

    @property
    def num_classes(self) -> int:
        return len(self.ids)

    @property
    def num_outputs(self) -> int:
        """Channels of the logits: regions where there are any, else classes with background."""
        return len(self.regions) or self.num_classes

    @property
    def foreground(self) -> tuple[tuple[str, int], ...]:
        """(name, id) of every class but background."""
        return tuple(zip(self.names[1:], self.ids[1:], strict=True))

    @property
    def ignore_index(self) -> int:
        """The class index that stands for `ignore_id`: 255, or 65535 from 255 classes on."""
        return IGNORE_INDEX if self.num_classes < IGNORE_INDEX else WIDE_IGNORE_INDEX

    @property
    def index_dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if self.num_classes < IGNORE_INDEX else np.uint16

    def region_members(self) -> tuple[tuple[int, ...], ...]:
        """Per region, the class indices that it unites."""
        return tuple(tuple(self.ids.index(i) for i in region.ids) for region in self.regions)

    def to_indices(
        self, array: NDArray[Any], *, where: str | PathLike[str] | None = None
    ) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Class indices (same shape) of a label map's ids; `ignore_id` becomes `ignore_index`.

        Errors: LabelError with the values that no class has and their voxel counts.
        """
        undeclared = self.ignore_index - 1  # no class has it: there are at most ignore_index - 1 classes
        known = {value: index for index, value in enumerate(self.ids)}
        if self.ignore_id is not None:
            known[self.ignore_id] = self.ignore_index
        indices = _look_up(array, known, default=undeclared, dtype=self.index_dtype)
        if (indices == undeclared).any():
            raise self._undeclared(array[indices == undeclared], where)
        return indices

    def to_ids(self, indices: NDArray[Any]) -> NDArray[Any]:
        """The ids of class indices, in the smallest unsigned integer type that holds every id of the set."""
        known = dict(enumerate(self.ids))
        if self.ignore_id is not None:
            known[self.ignore_index] = self.ignore_id
        largest = max(known.values())
        assert indices.size == 0 or int(indices.max()) in known, "class index out of range"
        return _look_up(indices, known, default=0, dtype=np.min_scalar_type(largest).type)

    def _undeclared(self, found: NDArray[Any], where: str | PathLike[str] | None) -> LabelError:
        values, counts = np.unique(found, return_counts=True)
        told = ", ".join(
            f"{v} ({c} {'voxel' if c == 1 else 'voxels'})"
            for v, c in zip(values[:_MAX_TOLD].tolist(), counts[:_MAX_TOLD].tolist(), strict=True)
        )
        more = f" and {len(values) - _MAX_TOLD} more" if len(values) > _MAX_TOLD else ""
        declared = ", ".join(f"{i} {name}" for name, i in zip(self.names, self.ids, strict=True))
        fact = f"holds undeclared label values: {told}{more}; declared: {declared}."
        if values.tolist() == [255] and self.num_classes == 2:
            name, value = self.foreground[0]
            return LabelError(fact, where=where, fix=f"if 255 means '{name}', say --map 255={value}.")
        fix = "declare them in the data set's labels, correct the file, or map them with --map VALUE=ID."
        return LabelError(fact, where=where, fix=fix)


def map_values(array: NDArray[Any], pairs: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """`array` with each (old, new) value replaced, all at once; the type widens where a new value needs it."""
    dtype = np.result_type(array.dtype, *(np.min_scalar_type(new) for _, new in pairs))
    mapped = array.astype(dtype)
    for old, new in pairs:
        mapped[array == old] = new
    return mapped


def _as_ids(name: str, value: Any, where: str | PathLike[str] | None) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) and value else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        fact = f"label '{name}' is {value!r}, not a whole number or a list of them."
        raise DatasetError(fact, where=where, fix="write name: number, as nnU-Net does.")
    return tuple(values)


def _look_up(array: NDArray[Any], known: Mapping[int, int], *, default: int, dtype: type[Any]) -> NDArray[Any]:
    """`known[value]` of every value, `default` where there is none; same memory order, bounded temporaries."""
    result = np.empty_like(array, dtype=dtype)  # keeps C or Fortran order
    if result.flags.f_contiguous:
        source, target = array.T, result.T
    else:
        source, target = array, result
    flat = np.ascontiguousarray(source).reshape(-1)
    out = target.reshape(-1)
    assert np.shares_memory(out, result) or not result.size, "a view was expected"
    if flat.dtype == np.bool_:
        flat = flat.view(np.uint8)
    elif flat.dtype in (np.int8, np.int16) and flat.size and flat.min() >= 0:
        flat = flat.view(f"u{flat.dtype.itemsize}")
    known = {key: value for key, value in known.items() if key <= np.iinfo(flat.dtype).max}
    keys = np.array(sorted(known), dtype=np.uint64 if flat.dtype.kind == "u" else np.int64)
    values = np.array([known[int(key)] for key in keys], dtype=dtype)
    table = None
    if flat.dtype.kind == "u" and flat.dtype.itemsize <= 2:
        table = np.full(np.iinfo(flat.dtype).max + 1, default, dtype=dtype)
        table[keys] = values
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK]
        if table is not None:
            np.take(table, block, out=out[start : start + _BLOCK], mode="wrap")
        elif len(keys):
            at = np.minimum(np.searchsorted(keys, block), len(keys) - 1)
            out[start : start + _BLOCK] = np.where(keys[at] == block, values[at], default)
        else:
            out[start : start + _BLOCK] = default
    return result
