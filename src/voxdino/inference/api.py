"""A trained model in Python: `voxdino.load(run).predict(image)`."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from voxdino.core.errors import ImageError, UsageError
from voxdino.core.io.in_memory import to_volume
from voxdino.core.io.values import require_finite
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.cases import num_source_channels
from voxdino.inference.choose import load_segmenting
from voxdino.inference.segmenting import Segmenting
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_case

__all__ = ["Model", "PredictSettings", "load_model"]

AnyPath = str | PathLike[str]


class Model:
    """A trained model, ready to predict; `voxdino.load` makes one. Threads may share it."""

    def __init__(self, segmenting: Segmenting) -> None:
        self._segmenting = segmenting

    def __repr__(self) -> str:
        return f"<voxdino model {self._segmenting.name}: {', '.join(self.labels)}>"

    @property
    def labels(self) -> dict[str, int]:
        """Name of every structure -> its value in a label map; background apart."""
        return dict(self._segmenting.plan.labels.foreground)

    @property
    def licence(self) -> str:
        """Of the weights, inherited from the backbone they started from."""
        return self._segmenting.licence

    def predict(
        self,
        image: Any,
        *,
        spacing: Sequence[float | int] | None = None,
        affine: NDArray[Any] | None = None,
        settings: PredictSettings | None = None,
    ) -> LabelMap:
        """Segment one image: a label map with `array` (*spatial) and `grid`, on the image's own grid.

        image:    a path (several: one file per channel), or an image in memory (see `to_volume`): an array with
                  `spacing` or `affine`, a nibabel or SimpleITK image, a MetaTensor of MONAI. The label map's array has
                  the axes of the file, of the array, or x, y, z of a SimpleITK image.
        settings: mirror, overlap, ...; default: as `voxdino predict`.
        Errors: ImageError, GeometryError for the image; UsageError for an array that does not say its spacing.
        """
        plan = self._segmenting.plan
        volume = self._read(image, spacing, affine)
        needed = num_source_channels(plan)
        if volume.num_channels != needed:
            names = ", ".join(dict.fromkeys(channel.name for channel in plan.channels))
            fact = f"has {volume.num_channels} channels, the model needs {needed} ({names})."
            raise ImageError(fact, where=volume.source or "image", fix="give exactly these channels, in this order.")
        return self._segmenting.segment(volume, settings or PredictSettings(), case="image")

    def _read(self, image: Any, spacing: Sequence[float | int] | None, affine: NDArray[Any] | None) -> Volume:
        plan = self._segmenting.plan
        paths = _paths(image)
        if not paths:
            volume = to_volume(image, ndim=plan.ndim, spacing=spacing, affine=affine)
            array, notes = require_finite(volume.array, plan.read_options.nan_policy, volume.source)
            return Volume(array, volume.grid, (*volume.notes, *notes), volume.source)
        if spacing is not None or affine is not None:
            raise UsageError("a file says itself where its image lies.", fix="leave spacing and affine out.")
        single = len(paths) == 1 and num_source_channels(plan) > 1
        return read_case(Case("image", paths, None, frames_as_channels=single), plan.read_options, None)[0]


def _paths(image: Any) -> tuple[Path, ...]:
    """The paths that `image` is; none where it is an image in memory."""
    if isinstance(image, str | PathLike):
        return (Path(image),)
    if isinstance(image, list | tuple) and image and all(isinstance(one, str | PathLike) for one in image):
        return tuple(Path(one) for one in image)
    return ()


def load_model(run: AnyPath | Sequence[AnyPath], *, device: str = "auto", clean_up: bool = True) -> Model:
    """The model of a run folder (several vote), or of a folder that `voxdino export` wrote (needs no torch then).

    device:   "auto", "cpu", "cuda" or "mps".
    clean_up: as `voxdino tune` chose for the (first) run.
    Errors: CheckpointError for a folder that is no complete model, ResourceError for a device that is not here.
    """
    runs = [Path(run)] if isinstance(run, str | PathLike) else [Path(one) for one in run]
    return Model(load_segmenting(runs, clean_up=clean_up, device=device))
