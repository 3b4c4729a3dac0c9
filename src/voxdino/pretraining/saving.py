"""Checkpoints of a pretraining: one file where every process holds the whole state, shards where it is shared out."""

import shutil
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from voxdino.core.errors import CheckpointError
from voxdino.core.safe_files import Manifest, read_json, write_json
from voxdino.training.checkpoint import FACTS, KEPT, Checkpoint, CheckpointFolder
from voxdino.training.distributed import World


@runtime_checkable
class Task(Protocol):
    """What is trained. state: every tensor that a resumed run needs, by name; writing to them changes the task."""

    def state(self) -> dict[str, Tensor]: ...


class Saver:
    """`checkpoint/` of a run: complete or absent, checked before it is used.

    The first process writes; where tensors are shared out (FSDP), every process writes its shard, and the folder gets
    its name when all have; the folder must be one that all of them see.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self._world = folder, world
        self._plain = CheckpointFolder(folder)
        self._newest: Checkpoint | None = None

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """All processes call it. Errors: ResourceError when the disk is full; the previous one is then still whole."""
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            if self._world.is_main:
                self._plain.save(Checkpoint(step, tensors, facts))
            self._world.wait()
            return
        target = self.folder / f"shards-{step:08d}"
        if not target.exists():
            self._write_shards(target, tensors, {"step": step, **facts})
        if self._world.is_main:
            for older in self._shards()[:-KEPT]:
                shutil.rmtree(older, ignore_errors=True)
        self._world.wait()

    def _write_shards(self, target: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        partial = self.folder / target.name.replace("shards", "partial")
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._world.wait()
        save(dict(tensors), checkpoint_id=str(partial))
        if self._world.is_main:
            write_json(partial / FACTS, facts)
            Manifest.of(partial, sorted(path.name for path in partial.iterdir())).write(partial)
            partial.rename(target)

    @property
    def has_checkpoint(self) -> bool:
        """Whether anything was saved, whole or damaged."""
        return any(self.folder.glob("step-*")) or bool(self._shards())

    def facts(self) -> dict[str, Any] | None:
        """Of the newest checkpoint, with its "step"; None when there is none. Errors: CheckpointError if damaged."""
        if self._world.is_main:
            for stray in self.folder.glob("partial-*"):  # left by a kill while saving
                shutil.rmtree(stray, ignore_errors=True)
        self._world.wait()
        if shards := self._shards():
            manifest = Manifest.read(shards[-1])
            if self._world.is_main:
                manifest.verify(shards[-1], list(manifest.files))
            return dict(read_json(shards[-1] / FACTS))
        self._newest = self._plain.newest()
        return None if self._newest is None else {"step": self._newest.step, **self._newest.facts}

    def load(self, task: Task) -> None:
        """What `facts` found, into the task, which is at the stage that was saved. Errors: CheckpointError."""
        own = task.state()
        if self._newest is not None:
            _require_same_names(self._newest.tensors, own, self.folder)
            held: dict[str, Any] = self._newest.tensors
            self._newest = None
        else:
            held = {name: torch.empty_like(tensor) for name, tensor in own.items()}
            load(held, checkpoint_id=str(self._shards()[-1]))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(held[name])

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shards-????????"))


def _require_same_names(saved: dict[str, Tensor], own: dict[str, Tensor], where: Path) -> None:
    wrong = [name for name in sorted({*saved, *own}) if name not in saved or name not in own]
    wrong += [name for name in own if name in saved and saved[name].shape != own[name].shape]
    if wrong:
        fact = f"{len(wrong)} tensors do not fit the networks: {', '.join(wrong[:3])}"
        raise CheckpointError(fact, where=where, fix="repeat the first command, or start in a new run folder.")
