"""How long cells will take, before they start: the encoder is measured on this machine, the rest is counted."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from voxdino.benchmark.classification import ClassificationData
from voxdino.benchmark.decoders import DECODER_EPOCHS, DECODER_STEPS, TRAIN_SLICES
from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import Cell
from voxdino.benchmark.images import IMAGES_AT_ONCE
from voxdino.benchmark.matching import MOST_SLICES
from voxdino.benchmark.segmentation import SegmentationData
from voxdino.benchmark.tasks import SegmentationTask, Task
from voxdino.inference.tiles import tile_boxes
from voxdino.models.precision import autocast, uses_bf16

STEP_S = 0.4  # of a light decoder on two CPU cores
FIT_S = {"linear": 4e-6, "patch": 1e-6}  # per number in the features, all strengths and iterations together
CASE_S = 0.15  # to read, restore and score a test case


@dataclass(frozen=True)
class Estimate:
    """seconds: in all; num_images: that the encoder still has to see."""

    seconds: float
    num_images: int


class Speed:
    """Seconds per image of each encoder and size, measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[str, int], float] = {}

    @torch.inference_mode()
    def __call__(self, encoder: Encoder, side: int) -> float:
        key = encoder.source, side
        if key not in self._known:
            backbone = encoder.load().to(self._device)
            images = torch.zeros(min(IMAGES_AT_ONCE, 8), 3, side, side, device=self._device)
            with autocast(self._device, uses_bf16(self._device, "auto")):
                times = []
                for _ in range(3):
                    started = time.perf_counter()
                    float(backbone(images, taps=backbone.default_taps()[-1:]).cls_token.sum())  # waits for a GPU
                    times.append((time.perf_counter() - started) / len(images))
            self._known[key] = min(times)
        return self._known[key]


def estimate(
    cell: Cell,
    data: ClassificationData | SegmentationData,
    task: Task,
    encoder: Encoder,
    speed: Speed,
    *,
    first: bool,
    fits: bool,
) -> Estimate:
    """Of one cell. first: no earlier cell computes its features; fits: none fits its probe."""
    seconds_per_image = speed(encoder, encoder.side(cell.resolution))
    if isinstance(data, ClassificationData):
        num_images = data.num_missing(encoder, cell) if first else 0
        num_train = len(data.split(cell.site)["train"])
        width = 2 * encoder.card.num_parameters**0.35  # near enough to the width of a transformer
        fit_s = 2 + FIT_S["linear"] * num_train * width * (4 if task.is_seeded else 1) if fits else 0.0
        return Estimate(num_images * seconds_per_image + fit_s, num_images)
    split, test = data.split(cell.site)
    assert isinstance(task, SegmentationTask)
    if task.cost == "none":
        cases = (*split.val, *test) if fits else test
        num_images = sum(min(MOST_SLICES, data.store.shape(case)[0]) for case in cases) if first else 0
        return Estimate(num_images * seconds_per_image + CASE_S * len(cases), num_images)
    num_test = sum(_num_tiles(data, case) for case in test)
    if not fits:
        num_images, other_s = num_test, 0.0
    elif task.cost == "steps":  # decoders: features of all training slices, then steps
        num_train = sum(data.store.shape(case)[0] for case in (*split.train, *split.val))
        num_images = (num_train if first else 0) + num_test
        other_s = DECODER_EPOCHS * DECODER_STEPS * STEP_S
    else:
        num_train = min(TRAIN_SLICES, len(split.train) * 100)
        num_images = num_train + num_test if first else 0
        tokens = np.prod(
            [
                max(1, side * data.magnification(encoder, cell.resolution) // encoder.patch_size)
                for side in data.plan.crop
            ]
        )
        other_s = FIT_S["patch"] * num_train * float(tokens) * 400
    return Estimate(num_images * seconds_per_image + other_s + CASE_S * len(test), num_images)


def _num_tiles(data: SegmentationData, case: str) -> int:
    depth, *size = data.store.shape(case)
    padded = [max(length, tile) for length, tile in zip(size, data.plan.tile, strict=True)]
    return depth * len(tile_boxes(padded, data.plan.tile))
