"""A time budget for the whole road: what training may take of it."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch

from voxdino.data.store import CaseStore
from voxdino.inference.tiles import tile_boxes
from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import autocast, uses_bf16
from voxdino.preparation.plan import Plan

LEAST_TRAINING_S = 10.0
WHOLE_MODEL = 2.5  # time of backbone, decoder, resizing and writing over that of the backbone alone
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


def predicting_s(workdir: Path, plan: Plan, case_ids: Sequence[str], backbone: ViT, device: torch.device) -> float:
    """How long predicting, scoring and drawing the prepared cases will take, from one measured tile."""
    store = CaseStore(workdir / "prepared")
    num_tiles = 0
    for case in case_ids:
        depth, *size = store.record(case).geometry.prepared_shape
        padded = [max(length, tile) for length, tile in zip(size, plan.tile, strict=True)]
        num_tiles += depth * len(tile_boxes(padded, plan.tile))
    pixels = [ceil(side * plan.magnification / plan.patch_size) * plan.patch_size for side in plan.tile]
    return FIXED_S + PER_CASE_S * len(case_ids) + WHOLE_MODEL * num_tiles * _seconds_per_tile(backbone, pixels, device)


@torch.no_grad()
def _seconds_per_tile(backbone: ViT, pixels: Sequence[int], device: torch.device) -> float:
    backbone = backbone.to(device)
    images = torch.zeros(4, 3, *pixels, device=device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        with autocast(device, uses_bf16(device, "auto")):  # as prediction does
            float(backbone(images).maps[-1].sum())  # the sum waits for a GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / len(images)
