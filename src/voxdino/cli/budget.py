"""A time budget for the whole road: what training may take of it."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from voxdino.data.store import CaseStore
from voxdino.inference.parts import predicted_slab
from voxdino.inference.tiles import OVERLAP, slab_starts, tile_boxes
from voxdino.models.precision import autocast, uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.plan import Plan

LEAST_TRAINING_S = 10.0
SLICES = 4  # measured together where they are independent
AFTER_MODEL = 1.3  # time with blending, resizing and writing over that of the model alone
PER_CASE_S = 0.4  # reading, scoring
FIXED_S = 8.0  # loading the model, the picture, the table


@dataclass(frozen=True)
class Budget:
    """total_s: of the whole command, None for no limit; counted from when the budget was made."""

    total_s: float | None
    started: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return float("inf") if self.total_s is None else self.total_s - (time.monotonic() - self.started)

    def for_training_s(self, reserved_s: float) -> float:
        """What is left but for the steps after training: never less than half of it, nor than 10 s."""
        return max(self.left_s() - reserved_s, self.left_s() / 2, LEAST_TRAINING_S)


def predicting_s(workdir: Path, plan: Plan, case_ids: Sequence[str], model: Segmenter, device: torch.device) -> float:
    """How long predicting, scoring and drawing the prepared cases will take, from one measured slab of tiles.

    plan: with the slab of the model.
    """
    store = CaseStore(workdir / "prepared")
    num_tiles = 0.0  # of as many slices as are measured
    slices = plan.slab if plan.slab > 1 else SLICES
    for case in case_ids:
        depth, *size = store.record(case).geometry.prepared_shape
        padded = [max(length, tile) for length, tile in zip(size, plan.tile, strict=True)]
        num_seen = float(depth)
        if plan.slab > 1:
            slab = predicted_slab(plan.slab, depth)
            num_seen = slab * len(slab_starts(depth, slab, overlap=OVERLAP))
        num_tiles += num_seen / slices * len(tile_boxes(padded, plan.tile))
    return (
        FIXED_S + PER_CASE_S * len(case_ids) + AFTER_MODEL * num_tiles * _seconds_per_tile(model, plan, slices, device)
    )


@torch.no_grad()
def _seconds_per_tile(model: Segmenter, plan: Plan, slices: int, device: torch.device) -> float:
    model = model.to(device).eval()
    image = torch.zeros(1, len(plan.channels), slices + 2 * plan.context_slices, *plan.tile, device=device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        with autocast(device, uses_bf16(device, "auto")):  # as prediction does
            float(model(image).logits.sum())  # the sum waits for a GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
