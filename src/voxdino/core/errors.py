"""The error family and the exit codes: every mistake a user can make ends in one of these.

A message has three parts: where (file or case), the fact found, and the fix. Exit code 1 is never used on purpose:
it means a bug in voxdino.
"""

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_RESOURCE = 4
EXIT_SAFETY = 5
EXIT_PARTIAL = 6
EXIT_DIVERGED = 7
EXIT_INTERRUPTED = 130  # SIGINT
EXIT_TERMINATED = 143  # SIGTERM


class VoxdinoError(Exception):
    """A mistake or fault that we foresaw: `where: fact Fix: fix`, and the exit code of its kind."""

    exit_code = EXIT_BUG

    def __init__(self, fact: str, *, where: str | PathLike[str] | None = None, fix: str | None = None) -> None:
        self.fact = fact
        self.where = None if where is None else str(where)
        self.fix = fix
        super().__init__(fact, where, fix)

    def __str__(self) -> str:
        place = "" if self.where is None else f"{self.where}: "
        remedy = "" if self.fix is None else f" Fix: {self.fix}"
        return f"{place}{self.fact}{remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.fact, self.where, self.fix), self.__dict__  # workers send errors by pickle


def _rebuild(kind: type[VoxdinoError], fact: str, where: str | None, fix: str | None) -> VoxdinoError:
    return kind(fact, where=where, fix=fix)


def without_folders(error: VoxdinoError, folders: Mapping[Path, str]) -> str:
    """The message for a record, which travels: each of `folders` gives way to its word (most often "")."""
    text = str(error)
    known = {str(form): word for folder, word in folders.items() for form in (folder, folder.absolute())}
    known |= {os.path.realpath(folder): word for folder, word in folders.items()}
    for folder in sorted(known.keys() - {".", os.sep}, key=len, reverse=True):
        begin, name = rf"(?<![\w./-]){re.escape(folder)}", Path(folder).name.replace("\\", r"\\")
        text = re.sub(rf"{begin}/", known[folder], re.sub(rf"{begin}(?![\w/-])", name, text))
    return text


class UsageError(VoxdinoError):
    """The command was used wrongly."""

    exit_code = EXIT_USAGE


class InputError(VoxdinoError, ValueError):
    """An input or a setting is bad."""

    exit_code = EXIT_INPUT


class ImageError(InputError):
    """A file is not the image it claims to be, or holds values we cannot use."""


class GeometryError(InputError):
    """Grids that must agree do not, or an affine is unusable."""


class LabelError(InputError):
    """A label map holds values the data set does not declare, or none at all."""


class DatasetError(InputError):
    """A data set's description or layout is wrong."""


class ConfigError(InputError):
    """A setting or a JSON record is wrong."""


class PlanError(InputError):
    """A plan does not fit the data or the model."""


class WeightsError(InputError):
    """A weights file is incomplete, damaged or of another architecture."""


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged or of another run."""


class ResourceError(VoxdinoError):
    """The environment lacks something: disk, memory, permission, device, package, lock."""

    exit_code = EXIT_RESOURCE


class SafetyError(VoxdinoError):
    """Refused for safety: code in a file, a path that escapes, a limit exceeded."""

    exit_code = EXIT_SAFETY


class PartialError(VoxdinoError):
    """Some cases failed, all of them listed; the others are done."""

    exit_code = EXIT_PARTIAL


class DivergedError(VoxdinoError):
    """Training diverged; the last good checkpoint is kept."""

    exit_code = EXIT_DIVERGED


class StoppedError(VoxdinoError):
    """A signal stopped the run at a safe point."""

    def __init__(
        self, fact: str, *, signal_number: int = 2, where: str | PathLike[str] | None = None, fix: str | None = None
    ) -> None:
        super().__init__(fact, where=where, fix=fix)
        self.exit_code = 128 + signal_number
