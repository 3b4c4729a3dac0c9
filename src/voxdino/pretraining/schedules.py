"""Numbers that change over the steps of a stage: rates, decay, momentum, temperature, weights of losses."""

import math

from pydantic import Field

from voxdino.core.records import Record


class Schedule(Record):
    """A number over a stage: straight from `start` to `peak`, a cosine from there to `end`, then constant.

    warmup: share of the steps for the way to the peak; 0: the stage starts there.
    cosine: share of the steps for the way to the end; the rest of the stage stays there. None: all that is left.

    DINOv3's schedules (dossier 5.7): with `peak` equal to `start` the cosine is one smooth ramp, with `end` equal to
    `peak` the number stays.
    """

    start: float
    peak: float
    end: float
    warmup: float = Field(default=0.0, ge=0, le=1)
    cosine: float | None = Field(default=None, ge=0, le=1)

    def at(self, step: int, num_steps: int) -> float:
        """step: 0-based, of `num_steps`."""
        rising = round(self.warmup * num_steps)
        if step < rising:
            return self.start + (self.peak - self.start) * (step + 1) / rising
        falling = num_steps - rising if self.cosine is None else round(self.cosine * num_steps)
        done = 1.0 if falling == 0 else min(1.0, (step - rising) / falling)
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * done))


def constant(value: float) -> Schedule:
    return Schedule(start=value, peak=value, end=value)


def rising(start: float, peak: float, warmup: float) -> Schedule:
    """Straight to the peak, then constant."""
    return Schedule(start=start, peak=peak, end=peak, warmup=warmup)
