"""The encoders of a grid: opened once to know them, loaded when their turn comes."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from voxdino.benchmark.grid import EncoderEntry
from voxdino.core.errors import ResourceError, WeightsError
from voxdino.models.backbones.base import Backbone
from voxdino.models.weights import load_backbone
from voxdino.models.weights_card import WeightsCard

EncoderKind = Literal["pretrained", "random", "pixels"]


@dataclass(frozen=True)
class Encoder:
    """An encoder of the tables. source: as `load_backbone` takes it.   patch_size: pixels per token."""

    name: str
    source: str
    card: WeightsCard
    patch_size: int

    @property
    def kind(self) -> EncoderKind:
        """What a reader must know: "random" and "pixels" are floors that an encoder has to beat."""
        if self.source.startswith("pixels:"):
            return "pixels"
        return "random" if self.source.startswith("random:") else "pretrained"

    def load(self) -> Backbone:
        """The backbone in eval mode; the one used last is kept."""
        return _load(self.source)

    def side(self, resolution: int) -> int:
        """Whole patches nearest to so many pixels."""
        return max(1, round(resolution / self.patch_size)) * self.patch_size


def open_encoder(entry: EncoderEntry, root: Path) -> Encoder | None:
    """Load an encoder to know it; None where it is optional and not there. Errors: those of loading."""
    source = _resolved(entry.source, root)
    try:
        backbone, card = load_backbone(source)
    except (WeightsError, ResourceError):
        if entry.optional:
            return None
        raise
    return Encoder(entry.name, source, card, backbone.patch_size)


@lru_cache(maxsize=1)
def _load(source: str) -> Backbone:
    return load_backbone(source)[0]


def _resolved(source: str, root: Path) -> str:
    """A file is looked for below the root; everything else is a name."""
    model, at, file = source.rpartition("@")
    path = root / file
    return f"{model}{at}{path}" if path.exists() else source
