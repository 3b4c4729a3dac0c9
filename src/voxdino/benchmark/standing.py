"""From the results of a run to what is compared: the resolution that validation chose, ranks, and paired tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from voxdino.benchmark.compare import Comparison, compare, interval_of, value_of
from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import TaskEntry
from voxdino.benchmark.measures import MEASURES
from voxdino.benchmark.result import CellResult
from voxdino.benchmark.run import Outcome
from voxdino.benchmark.tasks import TASKS, Task
from voxdino.evaluation.comparison import RankTable, rank_table
from voxdino.report.page import Interval


@dataclass(frozen=True, eq=False)
class Entry:
    """An encoder on a task, at the resolution that the validation cases chose."""

    encoder: Encoder
    result: CellResult
    score: Interval


@dataclass(frozen=True)
class Robustness:
    """An encoder on a task whose test images are corrupted. clean: its score of images as they are.

    scores: fault -> strength -> score.
    """

    result: CellResult
    clean: float
    scores: dict[str, dict[int, float]]

    @property
    def means(self) -> dict[str, float]:
        """Of each fault over its strengths."""
        return {name: fmean(of_strength.values()) for name, of_strength in self.scores.items()}

    @property
    def drop(self) -> float:
        """How far the score falls, on average over faults and strengths."""
        return self.clean - fmean(self.means.values())

    @property
    def worst(self) -> str:
        """The fault that it suffers most from."""
        return min(self.means, key=lambda name: self.means[name])


@dataclass(frozen=True, eq=False)
class Standing:
    """What the tables, the curves and the words of a report are made of."""

    outcome: Outcome

    @property
    def tasks(self) -> Iterator[tuple[TaskEntry, Task]]:
        """Those with a result, in the order of the grid."""
        for entry in self.outcome.grid.tasks:
            if any(result.cell.task == entry.name for result in self.outcome.results):
                yield entry, TASKS[entry.probe]

    def whole(self, task: str, encoder: str) -> list[CellResult]:
        """With all training cases and the first seed, by resolution."""
        return [
            one for one in self._of(task, encoder) if one.cell.is_whole and one.cell.seed == self.outcome.grid.seeds[0]
        ]

    def few(self, task: str, encoder: str) -> dict[int, list[CellResult]]:
        """Number of training cases -> the results of all seeds, ascending."""
        found: dict[int, list[CellResult]] = {}
        for one in self._of(task, encoder):
            if one.cell.shots is not None:
                found.setdefault(one.cell.shots, []).append(one)
        return dict(sorted(found.items()))

    def sites(self, task: str, encoder: str) -> list[CellResult]:
        """With each site held out, at the resolution of the curve of small data."""
        return [one for one in self._of(task, encoder) if one.cell.site is not None]

    def robustness(self, task: TaskEntry, encoder: str) -> Robustness | None:
        """None where no corruption was measured."""
        metric, scores = TASKS[task.probe].metric, dict[str, dict[int, float]]()
        clean = [one for one in self.whole(task.name, encoder) if one.cell.resolution == task.curve_resolution]
        for one in self._of(task.name, encoder):
            if one.cell.corruption is not None and (value := value_of(one, metric)) is not None:
                scores.setdefault(one.cell.corruption, {})[one.cell.strength] = value
        whole = values_of(clean, metric)
        return Robustness(clean[0], whole[0], scores) if whole and scores else None

    def seeds(self, result: CellResult) -> list[CellResult]:
        """The same cell with every seed."""
        at = result.cell.model_copy(update={"seed": 0})
        return [one for one in self.outcome.results if one.cell.model_copy(update={"seed": 0}) == at]

    @cached_property
    def board(self) -> dict[str, list[Entry]]:
        """Task -> encoders in the order of the grid, each at its chosen resolution."""
        board = {}
        for entry, task in self.tasks:
            board[entry.name] = [
                Entry(encoder, best, interval_of(best, task.metric))
                for name, encoder in self.outcome.encoders.items()
                if (best := _chosen(self.whole(entry.name, name), task.chosen_by)) is not None
            ]
        return {name: entries for name, entries in board.items() if entries}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All pairs of encoders of each task."""
        metrics = [TASKS[entry.probe].metric for entry, _ in self.tasks if entry.name in self.board]
        return compare([[one.result for one in entries] for entries in self.board.values()], metrics)

    @cached_property
    def ranks(self) -> tuple[tuple[str, ...], RankTable] | None:
        """Names and ranks over the tasks; None for fewer than two encoders or two tasks that all of them have."""
        names = tuple(self.outcome.encoders)
        scores = np.array([[self._score(task, name) for name in names] for task in self.board])
        if len(names) < 2 or len(scores) < 2 or (~np.isnan(scores).any(axis=1)).sum() < 2:
            return None
        return names, rank_table(scores)

    def comparison(self, task: str, first: str, second: str) -> tuple[Comparison, float] | None:
        """Of two encoders, and +1 or -1 for the direction of its difference as asked for."""
        for one in self.comparisons:
            if one.task == task and {one.first, one.second} == {first, second}:
                return one, 1.0 if one.first == first else -1.0
        return None

    def _score(self, task: str, encoder: str) -> float:
        for one in self.board[task]:
            if one.encoder.name == encoder and one.score.mean is not None:
                return one.score.mean
        return float("nan")

    def _of(self, task: str, encoder: str) -> Iterator[CellResult]:
        return (one for one in self.outcome.results if (one.cell.task, one.cell.encoder) == (task, encoder))


def values_of(results: Sequence[CellResult], metric: str) -> list[float]:
    """Of results that have the metric."""
    return [value for one in results if (value := value_of(one, metric)) is not None]


def _chosen(results: Sequence[CellResult], measure: str) -> CellResult | None:
    """The one with the best of the measure on validation, of equals the smaller resolution; without it the middle."""
    if not results:
        return None
    known = [one for one in results if one.validation is not None]
    if not known:
        return results[len(results) // 2]
    sign = -1 if MEASURES[measure].better == "lower" else 1
    return max(known, key=lambda one: (sign * (one.validation or 0.0), -one.cell.resolution))
