"""A grid from its file to results: every cell measured once, whenever the run is killed and started again."""

import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from voxdino.benchmark.bench import FAULTS, Bench
from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.estimate import Speed, estimate
from voxdino.benchmark.grid import Cell, Grid, entry_of
from voxdino.benchmark.result import CellResult
from voxdino.core.errors import InputError, PartialError, VoxdinoError, without_folders
from voxdino.core.locks import lock_folder
from voxdino.core.safe_files import sweep_temporary
from voxdino.core.shards import Shard
from voxdino.models.precision import resolve_device
from voxdino.preparation.workers import OverCases

_WAIT_FOR_SETS_S = 24 * 3600.0  # while another shard prepares the data sets for all


@dataclass(frozen=True, eq=False)
class Outcome:
    """What there is after a run.

    results: of all cells that are measured, in the order of the grid.
    missing: cells for which the budget did not last.   failed: what could not be measured -> why.
    absent:  optional encoders that are not there.
    """

    grid: Grid
    encoders: dict[str, Encoder]
    results: tuple[CellResult, ...]
    missing: tuple[Cell, ...]
    failed: dict[str, str]
    absent: tuple[str, ...]

    def error(self, where: Path) -> VoxdinoError | None:
        """What could not be measured, if anything; an InputError where that is everything."""
        if not self.failed:
            return None
        kind = PartialError if self.results else InputError
        told = "; ".join(f"{name} ({reason})" for name, reason in self.failed.items())
        return kind(f"could not be measured: {told}", where=where, fix="correct it and run the same command again.")


@dataclass(frozen=True)
class Unit:
    """Cells that are measured one after the other, because they share the features of an encoder on a data set."""

    id: str
    cells: tuple[Cell, ...]

    def without(self, cells: Container[Cell]) -> "Unit":
        return replace(self, cells=tuple(cell for cell in self.cells if cell not in cells))


CellEnd = tuple[Cell, CellResult | str | None]  # str: why there is none; None: time does not last


def units_of(bench: Bench, shard: Shard | None = None) -> list[Unit]:
    """All cells (of the shard), by what they share: no two units compute the same features."""
    grouped: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in bench.cells:
        encoder = bench.encoders[cell.encoder]
        key = entry_of(bench.grid, cell.task).data, encoder.source, encoder.side(cell.resolution)
        grouped.setdefault(key, []).append(cell)
    units = [
        Unit(f"{data}: {cells[0].encoder} at {side} px", tuple(cells)) for (data, _, side), cells in grouped.items()
    ]
    return units if shard is None else shard.of(units)


def run_grid(
    grid: Grid,
    root: Path,
    folder: Path,
    *,
    device: str = "auto",
    budget_s: float | None = None,
    shard: Shard | None = None,
    over_cases: OverCases | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Measure every cell that `folder` does not hold yet. A second call with the same grid goes on.

    budget_s:   no cell is started that would not be done by then, by the estimate.
    shard:      measure this part only, beside calls with the others.
    over_cases: who measures, unit by unit, in place of this process; `folder` and `root` must be reachable from there.
    say:        told the estimate, what is skipped, what failed, and whom it waits for.
    on_progress(done, total): now and then.
    Errors: those of the encoders; ResourceError for disk, lock and device. A data set or a cell that cannot be used is
    in `failed`, and the others go on.
    """
    until = None if budget_s is None else time.time() + budget_s
    bench_at = _BenchAt(grid, root.absolute(), folder.absolute(), resolve_device(device))
    with lock_folder(folder, part="" if shard is None else str(shard)), torch.random.fork_rng(devices=[]):
        for part in (folder, folder / "cells"):
            sweep_temporary(part)
        one_by_one = lock_folder(folder, part="sets", wait_s=_WAIT_FOR_SETS_S, on_wait=say)
        with nullcontext() if shard is None else one_by_one:
            bench = bench_at.open()
        _say_what_is_left_out(bench, say)
        results = {cell: found for cell in bench.cells if (found := bench.result(cell)) is not None}
        units = [unit.without(results) for unit in units_of(bench, shard)]
        todo = [cell for unit in units for cell in unit.cells]
        expected = _estimates(bench, todo)
        say(_told(results, todo, expected))
        missing, failed = list[Cell](), dict(bench.failed)
        if over_cases is None:
            ends = measure_each(bench, todo, expected, until)
        else:
            task = _MeasureUnit(bench_at, expected, until)
            ends = _measured_elsewhere(over_cases, task, [unit for unit in units if unit.cells], bench)
        with closing(ends):
            for cell, end in ends:
                if isinstance(end, CellResult):
                    results[cell] = end
                elif end is None:
                    missing.append(cell)
                else:
                    failed[str(cell)] = end
                    say(f"{cell}: {end}")
                if on_progress:
                    on_progress(len(results), len(bench.cells))
    ordered = tuple(results[cell] for cell in bench.cells if cell in results)
    return Outcome(grid, bench.encoders, ordered, tuple(missing), failed, bench.absent)


def _say_what_is_left_out(bench: Bench, say: Callable[[str], None]) -> None:
    for name in bench.absent:
        say(f"{name} is not there and is left out")
    for name, reason in bench.failed.items():
        say(f"{name} is left out: {reason}")


def measure_each(
    bench: Bench, cells: Sequence[Cell], expected: Mapping[Cell, float], until: float | None
) -> Generator[CellEnd, None, None]:
    """How each cell ended: its result, which is written; why there is none; None where it would end after `until`.

    expected: seconds that each takes.   until: a time of the clock on the wall. A cell that is left out takes those
    with it that were to find its features or its probe there: what they would take themselves is not in `expected`.
    """
    there, lacking = set[object](), set[object]()
    for cell in cells:
        parts = set(_parts(cell))
        if until is not None and (parts & lacking or expected[cell] > until - time.time()):
            lacking |= parts - there
            yield cell, None
            continue
        there |= parts
        try:
            result = bench.measure(cell)
        except FAULTS as error:
            yield cell, without_folders(error, {bench.root: "", bench.folder: ""})
            continue
        result.write(bench.path(cell))
        yield cell, result


@dataclass(frozen=True)
class _BenchAt:
    """What a bench is opened from, on any machine."""

    grid: Grid
    root: Path
    folder: Path
    device: torch.device

    def open(self) -> Bench:
        return Bench(self.grid, self.root, self.folder, self.device)


_opened = lru_cache(maxsize=1)(_BenchAt.open)  # once in a worker's life


@dataclass(frozen=True)
class _MeasureUnit:
    """Travels to the workers. A unit that is tried again goes on where the lost worker was."""

    bench_at: _BenchAt
    expected: Mapping[Cell, float]
    until: float | None

    def __call__(self, unit: Unit) -> list[CellEnd]:
        bench = _opened(self.bench_at)
        there = {cell: bench.result(cell) for cell in unit.cells}
        todo = [cell for cell, result in there.items() if result is None]
        ends: list[CellEnd] = [(cell, result) for cell, result in there.items() if result is not None]
        return [*ends, *measure_each(bench, todo, self.expected, self.until)]


def _measured_elsewhere(
    over_cases: OverCases, task: _MeasureUnit, units: Sequence[Unit], bench: Bench
) -> Generator[CellEnd, None, None]:
    with closing(over_cases(task, units, [unit.id for unit in units])) as outcomes:
        for outcome in outcomes:
            if outcome.fault is None:
                assert outcome.value is not None
                yield from outcome.value
                continue
            told = without_folders(outcome.fault.error, {bench.root: "", bench.folder: ""})
            for cell in units[outcome.index].cells:
                yield cell, bench.result(cell) or told


def _estimates(bench: Bench, todo: Sequence[Cell]) -> dict[Cell, float]:
    """Seconds of each; features that an earlier cell of the list computes, and its probe, are not counted again."""
    speed, counted = Speed(bench.device), set[object]()
    found = {}
    for cell in todo:
        is_first, fits = (part not in counted for part in _parts(cell))
        counted.update(_parts(cell))
        task, encoder = bench.tasks[cell.task], bench.encoders[cell.encoder]
        found[cell] = estimate(cell, bench.data(cell), task, encoder, speed, first=is_first, fits=fits).seconds
    return found


def _parts(cell: Cell) -> tuple[object, Cell]:
    """What later cells find there once this one is measured: the features of its images, and its probe."""
    return (cell.task, cell.encoder, cell.resolution, cell.corruption, cell.strength), cell.clean


def _told(results: dict[Cell, CellResult], todo: Sequence[Cell], expected: Mapping[Cell, float]) -> str:
    """The estimate in words, by encoder and task."""
    if not todo:
        return f"all {len(results)} cells are measured"
    return "\n".join((f"{len(todo)} cells to measure, {len(results)} are there", *_lines(todo, expected)))


def _lines(todo: Sequence[Cell], expected: Mapping[Cell, float]) -> Iterator[str]:
    sums: dict[str, float] = {}
    for cell in todo:
        name = f"{cell.task}, {cell.encoder}"
        sums[name] = sums.get(name, 0.0) + expected[cell]
    for name, seconds in sums.items():
        yield f"  about {seconds / 60:5.1f} min  {name}"
    yield f"  about {sum(sums.values()) / 60:5.1f} min  in all"
