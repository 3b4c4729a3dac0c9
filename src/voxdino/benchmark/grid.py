"""The grid file: which encoders are measured on which tasks, at which resolutions, with how many cases."""

from collections.abc import Mapping
from itertools import product
from typing import Literal

from pydantic import Field, field_validator, model_validator

from voxdino.core.io.options import ReadOptions
from voxdino.core.records import Record, nearest
from voxdino.data.corruptions import CORRUPTIONS, STRENGTHS

MOST_SITES = 20  # groups that are held back in turn; more of them are patients, not sites


class EncoderEntry(Record):
    """An encoder and the name it has in the tables.

    source:   what `voxdino.models.weights.load_backbone` takes: a file (relative to the grid's root), the name of
              imported weights, "timm:MODEL" or "timm:MODEL@FILE", "random:ARCHITECTURE", "pixels:PATCH".
    optional: left out, and said so, where its weights are not there.
    """

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    optional: bool = False


class TaskEntry(Record):
    """A data set and what is asked of its frozen features.

    data:        relative to the grid's root.
    probe:       a name of voxdino.benchmark.tasks.TASKS.
    modality:    a word for the reader: "MR", "electron microscopy".
    resolutions: pixels that the encoder sees, along the longer side of a picture (classification) or of a crop
                 (segmentation); brought to whole patches.
    shots:       numbers of training cases for the curve of small data: per class, or in all for segmentation.
    shots_at:    the resolution of that curve and of corruptions; default: the middle one.
    corruptions: faults of the test images, names of voxdino.data.corruptions.CORRUPTIONS, or "all" of them; the probe
                 is that of the images as they are.   strengths: of each fault, from 1 to 5.
    hold_out:    "split": the data set's test cases (or fold `fold`); "group": each group (site) in turn, without shots
                 and corruptions.
    axes, slices: of volumes to classify: the axes they are cut along, and slices of each axis, evenly spread.
    window:      3: a slice comes with its neighbours, as the three colours; 1: alone.
    limit:       at most so many training and so many test cases, evenly spread; for trials.
    """

    name: str = Field(min_length=1)
    data: str = Field(min_length=1)
    probe: str
    modality: str = ""
    resolutions: tuple[int, ...] = Field(min_length=1)
    shots: tuple[int, ...] = ()
    shots_at: int | None = None
    corruptions: tuple[str, ...] | Literal["all"] = ()
    strengths: tuple[int, ...] = Field(default=STRENGTHS, min_length=1)
    hold_out: Literal["split", "group"] = "split"
    fold: int = Field(default=0, ge=0)
    axes: tuple[Literal[0, 1, 2], ...] = Field(default=(0, 1), min_length=1)
    slices: int = Field(default=9, ge=1)
    window: Literal[1, 3] = 3
    limit: int | None = Field(default=None, ge=2)
    read_options: ReadOptions = ReadOptions()

    @field_validator("resolutions", "shots", "strengths")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 1 for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{list(values)} must be different numbers above 0")
        return tuple(sorted(values))

    @model_validator(mode="after")
    def _corruptions_are_known(self) -> "TaskEntry":
        for name in self.faults:
            if name not in CORRUPTIONS:
                raise ValueError(f"no corruption '{name}'.{nearest(name, CORRUPTIONS)} Known: {', '.join(CORRUPTIONS)}")
        if not set(self.strengths) <= set(STRENGTHS):
            raise ValueError(f"strengths {list(self.strengths)} must be from {STRENGTHS[0]} to {STRENGTHS[-1]}")
        return self

    @model_validator(mode="after")
    def _sites_have_no_curves(self) -> "TaskEntry":
        for name, values in (("shots", self.shots), ("corruptions", self.faults)):
            if values and self.hold_out == "group":
                raise ValueError(f"{name} are not measured of sites: leave them out, or take hold_out split")
        return self

    @model_validator(mode="after")
    def _curve_has_a_place(self) -> "TaskEntry":
        if self.shots_at is not None and self.shots_at not in self.resolutions:
            raise ValueError(f"shots_at {self.shots_at} is none of the resolutions {list(self.resolutions)}")
        return self

    @property
    def faults(self) -> tuple[str, ...]:
        """The corruptions by name."""
        return tuple(CORRUPTIONS) if self.corruptions == "all" else tuple(dict.fromkeys(self.corruptions))

    @property
    def curve_resolution(self) -> int:
        return self.shots_at or self.resolutions[len(self.resolutions) // 2]


class Grid(Record):
    """A grid file. seeds: of drawn cases and of probes that train; the first one is that of the tables."""

    title: str = "Benchmark"
    encoders: tuple[EncoderEntry, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Grid":
        for kind, names in (
            ("encoders", [one.name for one in self.encoders]),
            ("tasks", [one.name for one in self.tasks]),
            ("seeds", list(map(str, self.seeds))),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind}: '{twice[0]}' comes twice")
        return self


class Cell(Record):
    """One number of the grid to measure. shots, site: None for all training cases and the data set's own split.

    corruption, strength: of the test images; None, 0 for images as they are.
    """

    task: str
    encoder: str
    resolution: int
    shots: int | None = None
    site: str | None = None
    seed: int = 0
    corruption: str | None = None
    strength: int = 0

    @property
    def is_whole(self) -> bool:
        """With all training cases, on the data set's own split, of images as they are."""
        return self.shots is None and self.site is None and self.corruption is None

    @property
    def clean(self) -> "Cell":
        """The cell of the same probe, asked of images as they are."""
        return self.model_copy(update={"corruption": None, "strength": 0})

    @property
    def key(self) -> object:
        """What its file is named by. Without a corruption it is that of versions that knew none."""
        return self.model_dump(mode="json", exclude=set() if self.corruption else {"corruption", "strength"})

    def __str__(self) -> str:
        few = "" if self.shots is None else f", {self.shots} cases, seed {self.seed}"
        site = "" if self.site is None else f", held-out {self.site}"
        fault = "" if self.corruption is None else f", {self.corruption} {self.strength}"
        return f"{self.task}: {self.encoder} at {self.resolution} px{few}{site}{fault}"


def cells_of(
    grid: Grid, encoders: Mapping[str, object], sites: Mapping[str, tuple[str | None, ...]], seeded: Mapping[str, bool]
) -> tuple[Cell, ...]:
    """All cells, those of one encoder, data set and resolution after each other; corruptions follow their probe.

    encoders: those that are there.  sites: of tasks that hold out groups.  seeded: task -> its probe depends on a seed
    even with all cases; of others the first seed is all there is.
    """
    cells = []
    for task in grid.tasks:
        whole = grid.seeds if seeded[task.name] else grid.seeds[:1]
        for encoder in encoders:
            for resolution in task.resolutions:
                at = Cell(task=task.name, encoder=encoder, resolution=resolution)
                has_curves = resolution == task.curve_resolution
                for site, seed in product(sites.get(task.name, (None,)), whole):
                    cells.append(at.model_copy(update={"site": site, "seed": seed}))
                    if has_curves and seed == grid.seeds[0]:
                        faults = product(task.faults, task.strengths)
                        cells += [cells[-1].model_copy(update={"corruption": f, "strength": s}) for f, s in faults]
                if has_curves:
                    drawn = product(task.shots, grid.seeds)
                    cells += [at.model_copy(update={"shots": number, "seed": seed}) for number, seed in drawn]
    return tuple(cells)


def entry_of(grid: Grid, task: str) -> TaskEntry:
    """The task of a name that the grid has."""
    found = {entry.name: entry for entry in grid.tasks}
    assert task in found, nearest(task, found)
    return found[task]
