"""How to predict: one record for the command line, predictions.json and the engine."""

from typing import Literal

from pydantic import Field

from voxdino.core.records import Record
from voxdino.inference.gate import GateKind
from voxdino.inference.tiles import OVERLAP

FAST_NAME = "fast.json"


class PredictSettings(Record):
    """How to predict; none of it changes what the model is.

    overlap:        least share of a tile's length that neighbouring tiles share.
    mirror:         average the logits of the four in-plane mirror images: four times the work, a little more accurate
                    where training mirrored too.
    second_look:    look again at small candidates, so many times magnified (see `second_look`); None: once is enough.
    slices_at_once: most crops of one slice per pass of the network; None: what suits the device. Fewer where memory
                    ends.
    amp:            bfloat16 arithmetic. "auto": where the hardware has it.
    gate:           skip what is empty: "auto" air in CT, "on" also what is black in other images, "off".
    """

    overlap: float = Field(default=OVERLAP, ge=0, lt=1)
    mirror: bool = False
    second_look: float | None = Field(default=None, gt=1)
    slices_at_once: int | None = Field(default=None, ge=1)
    amp: Literal["auto", "bf16", "off"] = "auto"
    gate: GateKind = "auto"


def hasty(settings: PredictSettings) -> PredictSettings:
    """What --fast does: tiles side by side instead of overlapping."""
    return settings.model_copy(update={"overlap": 0.0, "mirror": False, "second_look": None})


class FastCost(Record):
    """fast.json: mean Dice over classes and held-back cases, and seconds for all of them, usual and with --fast."""

    num_cases: int
    device: str
    dice: float
    dice_fast: float
    seconds: float
    seconds_fast: float

    def in_words(self) -> str:
        change, times = self.dice_fast - self.dice, self.seconds / max(self.seconds_fast, 1e-9)
        return f"--fast: {change:+.4f} Dice, {times:.1f} times as fast ({self.num_cases} held-back cases)"
