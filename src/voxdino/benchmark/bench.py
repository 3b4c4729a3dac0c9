"""The encoders and data sets of a grid, opened: where each cell's result lies, and how it is measured."""

import time
from pathlib import Path
from typing import Any

import torch

from voxdino.benchmark.classification import ClassificationData
from voxdino.benchmark.encoders import Encoder, open_encoder
from voxdino.benchmark.grid import MOST_SITES, Cell, Grid, TaskEntry, cells_of, entry_of
from voxdino.benchmark.result import CellResult
from voxdino.benchmark.segmentation import SegmentationData
from voxdino.benchmark.tasks import TASKS, ClassificationTask, Task, task_of
from voxdino.core.errors import ConfigError, DivergedError, InputError, SafetyError, UsageError, without_folders
from voxdino.core.safe_files import digest_json

FORMAT = 1  # raised when the meaning of a cell's number changes: older results are then not found, never misread

FAULTS = (InputError, SafetyError, UsageError, DivergedError)  # of one task or cell: the others go on

Data = ClassificationData | SegmentationData


class Bench:
    """The encoders and data sets of a grid, opened. Errors: those of encoders and of `task_of`.

    root:   what the grid's paths are relative to.   folder: where everything is written.
    failed: tasks whose data cannot be used, with the reason.
    """

    def __init__(self, grid: Grid, root: Path, folder: Path, device: torch.device) -> None:
        self.grid, self.root, self.folder, self.device = grid, root, folder, device
        self.tasks: dict[str, Task] = {task.name: task_of(task) for task in grid.tasks}
        opened = {entry.name: open_encoder(entry, root) for entry in grid.encoders}
        self.encoders = {name: encoder for name, encoder in opened.items() if encoder is not None}
        self.absent = tuple(name for name in opened if name not in self.encoders)
        self.failed: dict[str, str] = {}
        self._data: dict[tuple[str, int], Data] = {}
        self._fitted: tuple[Cell, Any] | None = None  # the last probe: cells of corruptions ask it again
        sites: dict[str, tuple[str | None, ...]] = {}
        for entry in grid.tasks:
            try:
                self._open(entry, root)
                sites[entry.name] = self._sites(entry.name)
            except FAULTS as error:
                self.failed[entry.name] = without_folders(error, {root: "", folder: ""})
        seeded = {name: task.is_seeded for name, task in self.tasks.items()}
        cells = cells_of(grid, self.encoders, sites, seeded)
        self.cells = tuple(cell for cell in cells if cell.task not in self.failed)

    def data(self, cell: Cell) -> Data:
        return self._data[cell.task, self._patch(self.tasks[cell.task], self.encoders[cell.encoder])]

    def path(self, cell: Cell) -> Path:
        """Where a cell's result lies: another encoder, data set, split or way to measure gives another name."""
        task, data = self.tasks[cell.task], self.data(cell)
        entry = entry_of(self.grid, cell.task)
        how = [entry.probe, entry.limit, entry.axes, entry.slices, entry.window]
        key = [FORMAT, cell.key, how, self.encoders[cell.encoder].card.file_digest, data.digest, task.chosen_by]
        key.append(data.ids(cell.site))
        return self.folder / "cells" / f"{digest_json(key)[:24]}.json"

    def result(self, cell: Cell) -> CellResult | None:
        """Of an earlier run; a damaged file is none."""
        try:
            return CellResult.read(self.path(cell))
        except InputError:
            return None

    def measure(self, cell: Cell) -> CellResult:
        """Errors: those of the data, the encoder and the probe."""
        started = time.monotonic()
        fit: Any = self.tasks[cell.task].fit  # of the kind that the task's data take
        data, encoder = self.data(cell), self.encoders[cell.encoder]
        if self._fitted is None or self._fitted[0] != cell.clean:
            self._fitted = None  # memory for one
            self._fitted = cell.clean, data.fit(cell.clean, encoder, fit)
        fitted: Any = self._fitted[1]
        result = data.measure(cell, encoder, fitted)
        return result.model_copy(update={"elapsed_s": round(time.monotonic() - started, 2)})

    def _open(self, entry: TaskEntry, root: Path) -> None:
        task = self.tasks[entry.name]
        for encoder in self.encoders.values():
            key = entry.name, self._patch(task, encoder)
            if key in self._data:
                continue
            data: Data
            if isinstance(task, ClassificationTask):
                data = ClassificationData.open(entry, root, self.folder, self.device)
                ndim: int = data.known.ndim
            else:
                data = SegmentationData.open(entry, root, self.folder, encoder, self.device)
                ndim = data.plan.ndim
            if task.ndim not in (None, ndim):
                known = ", ".join(name for name, other in TASKS.items() if type(other) is type(task))
                fact = f"the probe {entry.probe} is for {task.ndim}-D images; these are {ndim}-D."
                raise ConfigError(fact, where=root / entry.data, fix=f"take another one of {known}.")
            self._data[key] = data

    def _sites(self, task: str) -> tuple[str | None, ...]:
        sites = next(data.sites for (name, _), data in self._data.items() if name == task)
        if len(sites) > MOST_SITES:
            fix = "take hold_out split: its groups are never torn apart."
            raise UsageError(f"{task}: {len(sites)} groups are patients, not sites.", where="hold_out", fix=fix)
        return sites

    @staticmethod
    def _patch(task: Task, encoder: Encoder) -> int:
        """What tells prepared sets apart; pictures to classify are the same for all."""
        return 0 if isinstance(task, ClassificationTask) else encoder.patch_size
