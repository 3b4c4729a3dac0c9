"""Alarms of a self-supervised training: collapse and numbers that are none, each with what to do about it.

Such a training has no validation Dice: a collapsed one has a low, smooth loss. What shows it are the teacher's targets
(one-hot, or even over all prototypes) and features that lose their directions (dossier 5.7).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from voxdino.core.errors import CheckpointError
from voxdino.core.records import Record


@dataclass(frozen=True)
class Alarm:
    """What went wrong at a step, and what to do.

    kind:     "not_a_number", "no_gradient", "one_hot", "even", "low_rank", "falling_rank", "same_direction".
    is_fatal: going on like this is without sense.
    """

    step: int
    kind: str
    fact: str
    fix: str
    is_fatal: bool = False

    def __str__(self) -> str:
        return f"step {self.step}: {self.fact} Fix: {self.fix}"


class AlarmLimits(Record):
    """When to say something.

    min_entropy:      of the teacher's targets, as a share of log K; below it they are one-hot.
    max_entropy:      as a share of log K; above it they are even and say nothing.
    min_rank:         effective rank of features; below it they have collapsed.
    max_rank_fall:    share of the largest effective rank of the last `rank_window` reports that may be lost.
    min_spread:       of normalised features (1: any direction, 0: all the same).
    patience:         reports in a row that must be beyond a limit where they are of single batches, which say little
                      (targets, gradients); features of fixed images count at once.
    warmup_steps:     before them targets and features of fresh heads may be anything; numbers must be numbers always.
    quiet_steps:      an alarm is not repeated before so many steps.
    """

    min_entropy: float = Field(default=0.01, ge=0, le=1)
    max_entropy: float = Field(default=0.99, ge=0, le=1)
    min_rank: float = Field(default=4.0, ge=0)
    max_rank_fall: float = Field(default=0.5, ge=0, le=1)
    rank_window: int = Field(default=10, ge=2)
    min_spread: float = Field(default=0.05, ge=0)
    patience: int = Field(default=3, ge=1)
    warmup_steps: int = Field(default=200, ge=0)
    quiet_steps: int = Field(default=1000, ge=0)


class AlarmState(Record):
    """What alarms remember; part of a checkpoint, so that a resumed run says the same.

    ranks:    the last effective ranks. counts: reports in a row beyond a limit, per kind and name.
    last_said: step of the last message, per kind and name.
    """

    ranks: tuple[float, ...] = ()
    counts: dict[str, int] = Field(default_factory=dict)
    last_said: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Finding:
    """One limit that was looked at. name: tells apart findings of one kind.

    is_sure: needs no patience. instant: no warm-up either.
    """

    kind: str
    name: str
    is_beyond: bool
    fact: str
    is_sure: bool = False
    instant: bool = False


class Alarms:
    """Feed it the numbers of a step; it returns what there is to say.

    num_prototypes: K of every kind of targets whose entropy is reported, {"dino": 65536, "ibot": 65536}.
    """

    def __init__(self, num_prototypes: Mapping[str, int], limits: AlarmLimits | None = None) -> None:
        self._log_k = {name: math.log(number) for name, number in num_prototypes.items()}
        self.limits = limits or AlarmLimits()
        self._ranks: list[float] = []
        self._counts: dict[str, int] = {}
        self._last_said: dict[str, int] = {}

    def update(
        self,
        step: int,
        *,
        losses: Mapping[str, float] | None = None,
        entropies: Mapping[str, float] | None = None,
        rank: float | None = None,
        spread: float | None = None,
        gradient_norm: float | None = None,
    ) -> tuple[Alarm, ...]:
        """The alarms of a step, fatal ones first; what is not given is not looked at.

        losses:    terms of the loss, by name.
        entropies: mean entropy of the teacher's targets in nats, by name (`probes.measures.target_entropy`).
        rank, spread: of features (`probes.effective_rank`, `probes.feature_spread`).
        """
        findings = [
            *self._numbers(losses or {}, entropies or {}, rank, spread, gradient_norm),
            *(finding for name, value in (entropies or {}).items() for finding in self._targets(name, value)),
            *self._features(rank, spread),
        ]
        said = [alarm for finding in findings if (alarm := self._judge(step, finding)) is not None]
        return tuple(sorted(said, key=lambda alarm: not alarm.is_fatal))

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain JSON."""
        state = AlarmState(ranks=tuple(self._ranks), counts=self._counts, last_said=self._last_said)
        found: dict[str, Any] = state.to_json()
        return found

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave. Errors: CheckpointError."""
        try:
            found = AlarmState.from_json(dict(state))
        except ValueError as error:
            raise CheckpointError(f"holds no state of alarms ({error})", fix="start the run anew.") from error
        self._ranks, self._counts, self._last_said = list(found.ranks), dict(found.counts), dict(found.last_said)

    def _numbers(
        self,
        losses: Mapping[str, float],
        entropies: Mapping[str, float],
        rank: float | None,
        spread: float | None,
        gradient_norm: float | None,
    ) -> list[_Finding]:
        values = {f"the loss term {name}": value for name, value in losses.items()}
        values |= {f"the entropy of the {name} targets": value for name, value in entropies.items()}
        others = {"the effective rank": rank, "the spread of features": spread, "the gradient norm": gradient_norm}
        values |= {name: value for name, value in others.items() if value is not None}
        found = [
            _Finding("not_a_number", name, not math.isfinite(value), f"{name} is {value}.", is_sure=True, instant=True)
            for name, value in values.items()
        ]
        if gradient_norm is not None:
            fact = "the gradient norm is 0: nothing trains."
            found.append(_Finding("no_gradient", "", gradient_norm == 0, fact))
        return found

    def _targets(self, name: str, entropy: float) -> list[_Finding]:
        """NaN is beyond no limit: it has an alarm of its own."""
        most = self._log_k[name]
        told = f"the teacher's {name} targets have an entropy of {entropy:.3g} nats"
        return [
            _Finding(
                "one_hot", name, entropy < self.limits.min_entropy * most, f"{told}: one prototype for every image."
            ),
            _Finding(
                "even",
                name,
                entropy > self.limits.max_entropy * most,
                f"{told}, of {most:.3g} at most: they say the same of every image.",
            ),
        ]

    def _features(self, rank: float | None, spread: float | None) -> list[_Finding]:
        found = []
        if rank is not None and math.isfinite(rank):
            fact = f"features have an effective rank of {rank:.1f}: they have collapsed into few directions."
            found.append(_Finding("low_rank", "", rank < self.limits.min_rank, fact, is_sure=True))
            self._ranks = [*self._ranks, rank][-self.limits.rank_window :]
            best = max(self._ranks)
            fact = f"the effective rank fell from {best:.1f} to {rank:.1f} within {len(self._ranks)} reports."
            is_beyond = rank < (1 - self.limits.max_rank_fall) * best
            found.append(_Finding("falling_rank", "", is_beyond, fact, is_sure=True))
        if spread is not None:
            fact = f"normalised features differ by {spread:.3g} (1: they point anywhere): they all point one way."
            found.append(_Finding("same_direction", "", spread < self.limits.min_spread, fact, is_sure=True))
        return found

    def _judge(self, step: int, finding: _Finding) -> Alarm | None:
        key = f"{finding.kind} {finding.name}".strip()
        if not finding.is_beyond:
            self._counts.pop(key, None)
            return None
        if not finding.instant and step < self.limits.warmup_steps:
            return None
        self._counts[key] = self._counts.get(key, 0) + 1
        is_due = step - self._last_said.get(key, -math.inf) >= self.limits.quiet_steps
        if (not finding.is_sure and self._counts[key] < self.limits.patience) or not is_due:
            return None
        self._last_said[key] = step
        return Alarm(step, finding.kind, finding.fact, FIXES[finding.kind], is_fatal=finding.kind in _FATAL)


_FATAL = {"not_a_number"}
_ANEW = "stop this run (a resumed one keeps its settings) and start a new one"
FIXES: dict[str, str] = {
    "not_a_number": "such a step is left out, one of them does no harm; where they come again and again, "
    f"{_ANEW} with half the learning_rate, or with precision off (float32).",
    "no_gradient": f"look whether all weights of the loss are 0, or everything is frozen; {_ANEW}.",
    "one_hot": f"{_ANEW} with a higher teacher_temperature, or one that rises more slowly, or with larger "
    "batches, over which Sinkhorn-Knopp evens the prototypes out.",
    "even": "look whether crops of the images show anything (pictures/ has whole ones); if they do, "
    f"{_ANEW} with a lower teacher_temperature, larger batches or fewer prototypes.",
    "low_rank": f"{_ANEW} with a higher koleo_weight or a lower learning_rate; look whether the pool is varied enough "
    "(near-duplicate slices thinned).",
    "falling_rank": f"{_ANEW} with a lower learning_rate or a higher teacher_momentum; if patch features fall "
    "too, with Gram anchoring.",
    "same_direction": f"check that images are normalised and not blank; if they are, {_ANEW} with a higher "
    "koleo_weight or a lower learning_rate.",
}
