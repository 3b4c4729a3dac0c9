"""voxdino: DINOv3 vision transformers for 2-D and 3-D medical images."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voxdino.inference.api import Model

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def load(
    run: "str | PathLike[str] | Sequence[str | PathLike[str]]", *, device: str = "auto", clean_up: bool = True
) -> "Model":
    """The model of a run folder, ready to predict: `voxdino.load(run).predict(image)`; see `inference.api`."""
    from voxdino.inference.api import load_model  # `import voxdino` costs nothing

    return load_model(run, device=device, clean_up=clean_up)
