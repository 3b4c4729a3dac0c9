"""Several processes that train together, as torchrun starts them; one alone needs no process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from voxdino.core.errors import ResourceError
from voxdino.models.precision import resolve_device


@dataclass(frozen=True)
class World:
    """The processes of one training. rank: of this one; group: None where it is alone."""

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        """The process that writes what all share."""
        return self.rank == 0

    def share(self, num_items: int) -> range:
        """The items of this process, of so many that are shared out evenly."""
        each = num_items // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def wait(self) -> None:
        """Until all are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def any(self, said: bool) -> bool:
        """Whether any process says so; all have to ask."""
        if self.group is None:
            return said
        told = torch.tensor([float(said)], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
        return bool(told.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of each number, over the processes."""
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """The world that torchrun's environment variables tell of, for the time of the block; without them one process.

    device: "auto", "cpu", "cuda" ...; each process takes the GPU of its local rank.
    Errors: ResourceError where the processes do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    target = resolve_device(device)
    if size == 1:
        yield World(0, 1, target)
        return
    if target.type == "cuda":
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(target)
    try:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        fix = "start with torchrun, which sets MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE for all processes."
        raise ResourceError(f"the {size} processes did not find each other ({error})", fix=fix) from error
    yield World(dist.get_rank(), size, target, dist.group.WORLD)
    dist.destroy_process_group()  # not after an error: the others may be waiting for this process, which has to end
