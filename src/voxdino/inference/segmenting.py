"""What predicts, seen from outside: torch models that vote (`Team`), or an exported one (`OnnxModel`)."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from voxdino.core.geometry import Grid
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.postprocess import Postprocessing
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.plan import Plan


@runtime_checkable
class Segmenting(Protocol):
    """From volumes to label maps. Those of equal digests make the same of the same volume.

    plan: how volumes are prepared, and the labels.   licence: of the weights.
    """

    @property
    def plan(self) -> Plan: ...

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def working_bytes(self, grid: Grid, settings: PredictSettings) -> int:
        """Memory of this machine that segmenting an image on `grid` takes beside the image, its labels and the model.

        Errors: PlanError for a picture under a plan for volumes, or the reverse.
        """
        ...

    def segment(
        self, volume: Volume, settings: PredictSettings, *, case: str, probabilities: Path | None = None
    ) -> LabelMap:
        """The label map of a volume (C, *spatial) in file values, in file ids on the volume's own grid.

        probabilities: a file to write them to.
        """
        ...


@runtime_checkable
class Announced(Segmenting, Protocol):
    """With what a command tells before it starts.

    who: each model, its device, backbone and licence.   magnifies: `PredictSettings.second_look` means something.
    after: what is cleaned up.
    """

    @property
    def who(self) -> tuple[str, ...]: ...

    @property
    def magnifies(self) -> bool: ...

    @property
    def after(self) -> Postprocessing: ...
