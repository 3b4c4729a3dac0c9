"""A label map that grows segment by segment, and says where segments overlap."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import LabelError

_MOST_TOLD = 12


class Palette:
    """Which label each segment gets.

    names:  number -> name, as the file has them.
    chosen: (name or number in the file, label) pairs, see `ReadOptions.segments`; empty: each its own number.
    Errors: LabelError for a segment that is not there, with those that are.
    """

    def __init__(self, names: dict[int, str], chosen: Sequence[tuple[str, int]], where: Path) -> None:
        self.names, self._where = names, where
        self.later_wins = bool(chosen)
        self.labels = {number: number for number in sorted(names)}
        if chosen:
            self.labels = {self._find(wanted): label for wanted, label in chosen}
        if any(label < 0 for label in self.labels.values()):
            raise LabelError("holds a negative segment number.", where=where, fix="export it again.")

    def _find(self, wanted: str) -> int:
        for number, name in self.names.items():
            if wanted.strip().casefold() in (str(number), name.strip().casefold()):
                return number
        known = ", ".join(f"{number} ({name})" for number, name in list(self.names.items())[:_MOST_TOLD])
        fact = f"has no segment '{wanted}'. It has {known}."
        raise LabelError(fact, where=self._where, fix="correct --segment NAME=ID.")

    def canvas(self, shape: tuple[int, ...]) -> NDArray[np.unsignedinteger]:
        """An empty label map that holds every label."""
        largest = max(self.labels.values(), default=0)
        return np.zeros(shape, np.min_scalar_type(largest))

    def paint(self, view: NDArray[np.unsignedinteger], mask: NDArray[np.bool_], number: int) -> None:
        """Give the voxels of `mask` the label of a segment. Errors: LabelError where another one has them already."""
        label = self.labels[number]
        if not self.later_wins:
            there = view[mask]
            other = there[(there != 0) & (there != label)]
            if other.size:
                fact = f"its segments overlap: {other[0]} ({self.names[int(other[0])]}) and "
                fact += f"{number} ({self.names[number]}) share voxels."
                fix = "say which you want, the later wins: --segment NAME=ID, repeated."
                raise LabelError(fact, where=self._where, fix=fix)
        view[mask] = label
