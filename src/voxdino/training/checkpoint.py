"""Checkpoints: a folder per step, complete or absent, its every byte checked before it is used."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from voxdino.core.errors import CheckpointError, InputError, ResourceError, VoxdinoError
from voxdino.core.records import Record
from voxdino.core.safe_files import Manifest, read_json, require_free_space, write_atomic, write_json

R = TypeVar("R", bound=Record)

TENSORS, FACTS = "state.safetensors", "state.json"
KEPT = 2  # the newest, and the one before it in case the newest goes bad on the disk


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A training at one step. tensors: by name; facts: everything that is JSON."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class CheckpointFolder:
    """`checkpoint/` of a run: step-00000120/ and the one before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Write beside the others, then rename; only when the new one is complete do older ones go.

        A step that is there is not written again: the same step of the same run is the same state. Older ones go then
        too: a kill may have come between the rename and their end.
        Errors: ResourceError when the disk is full; the previous checkpoint is then still whole.
        """
        target = self.folder / f"step-{checkpoint.step:08d}"
        if not target.exists():
            self._write(checkpoint, target)
        for older in self._complete()[:-KEPT]:
            shutil.rmtree(older, ignore_errors=True)

    def _write(self, checkpoint: Checkpoint, target: Path) -> None:
        partial = self.folder / f"partial-{checkpoint.step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        require_free_space(self.folder, sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
        with write_atomic(partial / TENSORS) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, temporary)
        write_json(partial / FACTS, {"step": checkpoint.step, **checkpoint.facts})
        Manifest.of(partial, [TENSORS, FACTS]).write(partial)
        try:
            partial.rename(target)
            _sync(self.folder)
        except OSError as error:
            raise ResourceError(
                f"the checkpoint could not be given its name ({error.strerror}).",
                where=target,
                fix="check the disk; the previous checkpoint is untouched.",
            ) from error

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, verified against its digests; None when there is none.

        Errors: CheckpointError naming the damaged file, and the newest good checkpoint to fall back to.
        """
        if not self.folder.is_dir():
            return None
        for stray in self.folder.glob("partial-*"):  # left by a kill while saving
            shutil.rmtree(stray, ignore_errors=True)
        complete = self._complete()
        if not complete:
            return None
        try:
            return _read(complete[-1])
        except VoxdinoError as damage:
            good = next((folder for folder in reversed(complete[:-1]) if _is_good(folder)), None)
            fix = (
                f"the newest good one is {good.name}: delete {complete[-1].name} to go on from there." if good else None
            )
            raise CheckpointError(
                damage.fact, where=damage.where, fix=fix or "no good one is left: start in a new run folder."
            ) from damage

    def _complete(self) -> list[Path]:
        """Checkpoint folders, oldest first. The exact pattern: a stray name must never be taken for the newest."""
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


def _read(folder: Path) -> Checkpoint:
    manifest = Manifest.read(folder)
    manifest.verify(folder, [TENSORS, FACTS])
    facts = read_json(folder / FACTS)
    return Checkpoint(int(facts.pop("step")), load_file(folder / TENSORS), facts)


def _is_good(folder: Path) -> bool:
    try:
        Manifest.read(folder).verify(folder, [TENSORS, FACTS])
    except VoxdinoError:
        return False
    return True


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """CheckpointError naming every setting that differs between the run that saved and the one that resumes."""
    differences = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"this checkpoint belongs to another run: {'; '.join(differences)}.",
            where=where,
            fix="repeat the first command, or start in a new run folder (--name).",
        )


def read_state(kind: type[R], path: Path, *, fix: str) -> R:
    """A record that a run keeps of itself. Errors: CheckpointError with this fix where the file is damaged."""
    try:
        return kind.read(path)
    except InputError as damage:
        raise CheckpointError(f"is damaged: {damage.fact}", where=path, fix=fix) from damage


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what `require_same` compares."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    parts = [flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
