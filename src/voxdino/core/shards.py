"""One of n equal parts of a list of cases: what a task of a Slurm array works on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from voxdino.core.errors import UsageError


@runtime_checkable
class Named(Protocol):
    @property
    def id(self) -> str: ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Shard:
    """Part `number` (1 to `count`) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """ "2/8". Errors: UsageError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            fix = "give I/N with I from 1 to N, such as 2/8 (Slurm: --array=1-8)."
            raise UsageError(f"--shard is '{text}'", fix=fix)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}of{self.count}"

    def of(self, cases: Sequence[N]) -> list[N]:
        """Every count-th case in the order of ids: all shards together have each case once."""
        return sorted(cases, key=lambda case: case.id)[self.number - 1 :: self.count]
