"""A series as a Volume: frames decoded in threads into one array, in the header's own values."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.filereader import dcmread
from pydicom.pixels.processing import apply_modality_lut

from voxdino.core.geometry import Grid, format_shape
from voxdino.core.io.dicom.headers import Instance, open_file, silently
from voxdino.core.io.dicom.pixels import read_frames
from voxdino.core.io.dicom.segments import spanned_grid
from voxdino.core.io.dicom.series import choose_series, look_into
from voxdino.core.io.dicom.shear import straighten
from voxdino.core.io.dicom.stack import Stack
from voxdino.core.io.dicom.values import Scale, rescaled, shifted, without_padding
from voxdino.core.memory import require_memory
from voxdino.core.volume import Volume


def read(path: Path, *, max_bytes: int | None = None, series: str | None = None) -> Volume:
    """The image (C, columns, rows, slices) of a series: a folder, a zip archive, or one file.

    A picture without a place in space is (C, rows, columns). Whole numbers stay whole; float32 where the header sets
    a scale. series: see `choose_series`.
    Errors: ImageError, GeometryError; SafetyError; ResourceError where a decoder is not installed.
    """
    with silently():
        return read_stack(choose_series(look_into(path), series), max_bytes)


def read_grid(path: Path, *, series: str | None = None) -> tuple[Grid, int]:
    """Grid and number of channels, from the headers alone; of a segmentation, the grid that its frames span."""
    with silently():
        contents = look_into(path)
        if not contents.instances and len(contents.annotations) == 1 and not contents.annotations[0].is_contours:
            return spanned_grid(contents.annotations[0].place), 1
        stack = choose_series(contents, series)
    return stack.grid, num_channels(stack.instances[0])


def num_channels(instance: Instance) -> int:
    return 3 if instance.samples == 3 or instance.photometric == "PALETTE COLOR" else 1


def read_stack(stack: Stack, max_bytes: int | None = None) -> Volume:
    """Decode and assemble the frames of a stack. Errors: as `read`."""
    first, scale, channels = stack.instances[0], Scale.of(stack), num_channels(stack.instances[0])
    shape = (len(stack.indices), first.rows, first.columns, channels)
    num_bytes = int(np.prod(shape)) * scale.dtype.itemsize * (2 if stack.shear != (0.0, 0.0) else 1)
    what = f"declares {format_shape((first.columns, first.rows, len(stack.indices)))} voxels"
    require_memory(num_bytes, what, where=stack.path, limit=max_bytes)
    array = np.empty(shape, scale.dtype)
    read_frames(stack.frames(), partial(_take, scale, array))
    notes: tuple[str, ...] = ()
    if any(file.padding for file in stack.instances):
        array, notes = without_padding(array, stack, scale)
    if scale.ends is not None and first.is_inverted:
        low, high = (array.dtype.type(end) for end in scale.ends)
        np.subtract(high, array, out=array)
        array += low
        notes += ("MONOCHROME1 (or an inverse presentation LUT): inverted, so that more is brighter",)
    array = shifted(array, scale.shift)
    volume = array.transpose(3, 2, 1, 0)  # (C, columns, rows, slices)
    grid = stack.grid
    if grid.ndim == 2:
        return Volume(volume[..., 0].transpose(0, 2, 1), grid, (*stack.notes, *notes), stack.path)
    if stack.shear != (0.0, 0.0):
        volume = straighten(volume, stack.shear, grid.shape, fill=array.min())
    return Volume(volume, grid, (*stack.notes, *notes), stack.path)


def _take(scale: Scale, array: NDArray[Any], target: int, instance: Instance, stored: NDArray[Any]) -> None:
    """Put one frame's values into its slice."""
    slope, intercept = scale.slopes[target], scale.intercepts[target]
    if instance.has_table:
        with open_file(instance.place) as file:
            header = dcmread(file, stop_before_pixels=True, force=True)
        stored, slope, intercept = apply_modality_lut(stored, header), 1.0, 0.0
    array[target] = rescaled(stored, slope, intercept, array.dtype).reshape(array.shape[1:])
