"""How much memory predicting a case takes, from its header, before any work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from voxdino.core.errors import ResourceError, VoxdinoError
from voxdino.core.geometry import format_shape
from voxdino.core.io import read_grid
from voxdino.core.memory import available_memory, is_out_of_memory
from voxdino.core.safe_files import format_bytes
from voxdino.inference.parts import LOGIT_BYTES
from voxdino.preparation.case import Case

WORKING_BYTES = 8 * LOGIT_BYTES  # logits as made, blended and resized; activations; slices read ahead
READ_BYTES = 6  # a value: as read, at most 4, and in the smallest type that holds it
LABEL_BYTES = 3  # a voxel: class indices, turned, and as ids of the file


def needed_bytes(case: Case) -> tuple[int, str]:
    """What predicting the case takes at most beside the model, and of what; (0, "") where its header cannot be read.

    Errors: none; reading the case will say what is wrong with it.
    """
    try:
        grid, num_channels = read_grid(case.images[0], series=case.series)
    except VoxdinoError:
        return 0, ""
    num_voxels = int(np.prod(grid.shape, dtype=np.int64))
    num_channels = max(num_channels, len(case.images))
    return num_voxels * (READ_BYTES * num_channels + LABEL_BYTES) + WORKING_BYTES, f"{format_shape(grid.shape)} voxels"


def require_memory_for(cases: Sequence[Case], *, at_once: int = 1) -> str:
    """What the largest case needs (the largest, where several are in work at once) and what is free, in words.

    Errors: ResourceError where that is too little.
    """
    if not cases:
        return ""
    needs = sorted(((needed_bytes(case), case) for case in cases), key=lambda pair: pair[0][0], reverse=True)
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
def memory_faults(case: Case) -> Iterator[None]:
    """Where memory ends all the same: ResourceError with the need and what is free now."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        need, what = needed_bytes(case)
        fact = f"memory ended: {what} need about {format_bytes(need)}, {format_bytes(available_memory())} are free."
        fix = "close other programs, raise the limit (ulimit -v), or use a machine with more memory."
        raise ResourceError(fact, where=case.images[0], fix=fix) from error
