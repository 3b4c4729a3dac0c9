"""Where there is anything to see: what lies outside gets background, and no pass through the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from voxdino.preparation.intensity import ChannelScaling
from voxdino.preparation.plan import Plan

GateKind = Literal["auto", "on", "off"]

AIR_HU = -500.0  # between air (-1000) and the body's surface; lungs lie inside the box of their chest
MARGIN = 8  # prepared voxels around what was found

Ends = tuple[int, int]
Region = tuple[Ends, Ends, Ends]  # first and last + 1 of (slices, rows, columns), prepared


@dataclass(frozen=True)
class Gate:
    """Which part of a slice is worth looking at.

    thresholds: (channel of the file, value): voxels above it count, in any of them. Empty: all count.
    within:     only inside this region; None: everywhere.
    """

    thresholds: tuple[tuple[int, float], ...] = ()
    within: Region | None = None

    def region(self, raw: Shaped[np.ndarray, "C d H W"], first: int) -> tuple[Ends, Ends] | None:
        """(rows, columns) to look at in the slices `raw`, which start at slice `first`; None: nothing there."""
        rows, columns = (0, raw.shape[2]), (0, raw.shape[3])
        if self.thresholds:
            found = self._mask(raw)
            if not found.any():
                return None
            rows, columns = (_ends(found.any(axis=axis), MARGIN) for axis in (1, 0))
        if self.within is None:
            return rows, columns
        depth, *plane = self.within
        if first >= depth[1] or first + raw.shape[1] <= depth[0]:
            return None
        rows, columns = ((max(a, c), min(b, d)) for (a, b), (c, d) in zip((rows, columns), plane, strict=True))
        return (rows, columns) if rows[0] < rows[1] and columns[0] < columns[1] else None

    def _mask(self, raw: Shaped[np.ndarray, "C d H W"]) -> Any:
        """(H, W), over all slices."""
        masks = [raw[source].max(axis=0) > value for source, value in self.thresholds]
        return np.logical_or.reduce(masks)


def _ends(found: Any, margin: int) -> Ends:
    places = np.flatnonzero(found)
    return max(0, int(places[0]) - margin), min(len(found), int(places[-1]) + 1 + margin)


def gate_for(plan: Plan, scaling: Sequence[ChannelScaling], kind: GateKind, within: Region | None = None) -> Gate:
    """The gate of a case: "auto" looks for a body in CT alone; "on" also, in other images, for what is not black."""
    if not is_gated(plan, kind):
        return Gate(within=within)
    pairs = zip(plan.channels, scaling, strict=True)
    thresholds = {(rule.source, AIR_HU if policy.kind in ("ct", "window") else rule.lower) for policy, rule in pairs}
    return Gate(tuple(sorted(thresholds)), within)


def is_gated(plan: Plan, kind: GateKind) -> bool:
    """Whether empty parts are skipped."""
    return kind == "on" or (kind == "auto" and all(channel.kind in ("ct", "window") for channel in plan.channels))


def at_least(ends: Ends, length: int, size: int) -> Ends:
    """The ends widened on both sides to `length` (to `size` where that is less), inside (0, size)."""
    start, stop = ends
    length = min(length, size)
    if stop - start >= length:
        return ends
    start = min(max(0, (start + stop - length) // 2), size - length)
    return start, start + length
