"""One of n equal parts of a list of cases: what a task of a Slurm array works on."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from voxdino.core.errors import UsageError

T = TypeVar("T")


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

    def of(self, cases: Sequence[T], key: Callable[[T], str] = attrgetter("id")) -> list[T]:
        """Every count-th case in the order of ids: all shards together have each case once."""
        return sorted(cases, key=key)[self.number - 1 :: self.count]


def file_of(path: Path, shard: Shard | None) -> Path:
    """A file for what a shard found: predictions.2of8.json beside predictions.json. None: the path itself."""
    return path if shard is None else path.with_name(f"{path.stem}.{shard}{path.suffix}")


def files_of_shards(path: Path) -> list[Path]:
    """Those that are there, of whatever shards."""
    name = re.compile(rf"{re.escape(path.stem)}\.\d+of\d+{re.escape(path.suffix)}")
    return sorted(other for other in path.parent.glob("*") if name.fullmatch(other.name))
