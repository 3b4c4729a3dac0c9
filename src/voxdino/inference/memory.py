"""How much memory predicting a case takes, from its header, before any work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from voxdino.core.errors import ResourceError, VoxdinoError
from voxdino.core.geometry import Grid, format_shape
from voxdino.core.io import read_grid
from voxdino.core.memory import available_memory, is_out_of_memory
from voxdino.core.safe_files import format_bytes
from voxdino.inference.parts import LOGIT_BYTES, predicted_slab, slice_bytes
from voxdino.inference.segmenting import Segmenting
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.case import Case
from voxdino.preparation.plan import Plan
from voxdino.preparation.slices import planned_geometry

_BESIDE = 5 * LOGIT_BYTES  # activations; slices read ahead; scores in the original size
_COPIES = 3  # of logits: as made, blended, and their classes compared
READ_BYTES = 6  # a value: as read, at most 4, and in the smallest type that holds it
LABEL_BYTES = 3  # a voxel: class indices, turned, and as ids of the file


def working_bytes(voters: Sequence[tuple[Plan, int]], grid: Grid) -> int:
    """What predicting an image on `grid` takes beside the image, its labels and the models, which are few and small.

    voters: of each model that votes its plan, and the values per voxel that it holds of a slab (see `Frame.blended`).
    Errors: PlanError, as `planned_geometry`.
    """
    held = logits = 0
    for plan, channels in voters:
        depth, *size = planned_geometry(grid, plan).prepared_shape
        logits = max(logits, slice_bytes(plan, size))
        if plan.slab > 1:
            tile = channels * int(np.prod(plan.tile))
            image = 2 * len(plan.channels) * int(np.prod(size))  # normalised, and the next one as read
            held += 4 * predicted_slab(plan.slab, depth) * (channels * int(np.prod(size)) + _COPIES * tile + image)
    return _BESIDE + _COPIES * max(LOGIT_BYTES, logits) + held


def needed_bytes(case: Case, model: Segmenting, settings: PredictSettings) -> tuple[int, str]:
    """What predicting the case takes at most beside the model, and of what; (0, "") where its header cannot be read.

    Errors: none; reading the case will say what is wrong with it.
    """
    try:
        grid, num_channels = read_grid(case.images[0], series=case.series)
        working = model.working_bytes(grid, settings)
    except VoxdinoError:
        return 0, ""
    num_voxels = int(np.prod(grid.shape, dtype=np.int64))
    num_channels = max(num_channels, len(case.images))
    return num_voxels * (READ_BYTES * num_channels + LABEL_BYTES) + working, f"{format_shape(grid.shape)} voxels"


def require_memory_for(cases: Sequence[Case], model: Segmenting, settings: PredictSettings, *, at_once: int = 1) -> str:
    """What the largest case needs (the largest, where several are in work at once) and what is free, in words.

    Errors: ResourceError where that is too little.
    """
    if not cases:
        return ""
    needs = [(needed_bytes(case, model, settings), case) for case in cases]
    needs.sort(key=lambda pair: pair[0][0], reverse=True)
    (one, what), largest = needs[0]
    need, free = sum(size for (size, _), _ in needs[:at_once]), available_memory()
    several = "" if at_once == 1 else f" and {at_once - 1} more at the same time"
    told = f"{what}{several} need about {format_bytes(need)}, {format_bytes(free)} are free"
    if one <= free < need:
        raise ResourceError(f"{told}.", where=largest.images[0], fix=f"use fewer workers: --on local:{free // one}.")
    if need > free:
        fix = f"close other programs, cut the image to what matters, or use a machine with {format_bytes(need)} free."
        raise ResourceError(f"{told}.", where=largest.images[0], fix=fix)
    return f"largest case: {told}" if need else ""


@contextmanager
def memory_faults(case: Case, model: Segmenting, settings: PredictSettings) -> Iterator[None]:
    """Where memory ends all the same: ResourceError with the need and what is free now."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        need, what = needed_bytes(case, model, settings)
        fact = f"memory ended: {what} need about {format_bytes(need)}, {format_bytes(available_memory())} are free."
        fix = "close other programs, raise the limit (ulimit -v), or use a machine with more memory."
        raise ResourceError(fact, where=case.images[0], fix=fix) from error
