"""Batches read ahead in background threads: the same ones, in the same order, whatever the number of threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxdino.core.errors import ResourceError
from voxdino.data.augment import AugmentConfig, augment, sample_seed
from voxdino.data.sampling import Draw
from voxdino.data.store import IGNORED, CaseStore

T = TypeVar("T")

HANG_S = 600.0
HELD_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops of one size from several cases.

    image:    (B, C, D + 2k, H, W) float32, normalised, with k context slices on each side.
    label:    (B, D, H, W) class indices; IGNORED beyond the volume.
    case_ids: where each sample comes from.
    padding:  (B, C) the normalised value of nothing.
    spacing:  (B, 3) slice, row and column size of a voxel.
    seeds:    one per sample, for its augmentation.
    """

    image: Float[Tensor, "B C Dk H W"]
    label: Int[Tensor, "B D H W"]
    case_ids: tuple[str, ...]
    padding: Float[Tensor, "B C"]
    spacing: Float[Tensor, "B 3"]
    seeds: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        image = self.image.to(device, non_blocking=True)
        label = self.label.to(device, non_blocking=True)
        return replace(self, image=image, label=label, padding=self.padding.to(device))

    def augmented(self, config: AugmentConfig) -> "Batch":
        """A changed copy, computed on the device the batch lies on."""
        image, label = augment(
            self.image,
            self.label,
            seeds=self.seeds,
            padding=self.padding,
            spacing=self.spacing,
            config=config,
            ignore_index=IGNORED,
        )
        return replace(self, image=image, label=label)


def assemble(store: CaseStore, draws: Sequence[Draw], *, context: int, seed: int) -> Batch:
    """Cut the draws from the store and stack them. Errors: those of `CaseStore.cut`, which name the case."""
    crops = [store.cut(draw.case_id, draw.box, context) for draw in draws]
    return Batch(
        image=torch.from_numpy(np.stack([crop.image for crop in crops])),
        label=torch.from_numpy(np.stack([crop.label for crop in crops])),
        case_ids=tuple(draw.case_id for draw in draws),
        padding=torch.from_numpy(np.stack([crop.padding for crop in crops])),
        spacing=torch.tensor([crop.spacing for crop in crops]),
        seeds=tuple(sample_seed(seed, draw.epoch, draw.index, draw.case_id, draw.box[0][0]) for draw in draws),
    )


class ReadAhead(Generic[T]):
    """fetch(first), fetch(first + 1), ... without end, the next few computed in background threads.

    fetch:       a pure function of the position, safe to call from threads. What it raises, the consumer gets.
    num_threads: 0 computes each item when it is asked for.
    depth:       items held at most, the one that was given last included.
    size_of:     bytes of an item; no more are then held than fit into `max_bytes` if all are as large as the largest
                 so far, but for the item that is asked for.

    Errors: ResourceError where an item takes longer than `hang_s` (a dead network drive).
    """

    def __init__(
        self,
        fetch: Callable[[int], T],
        *,
        first: int = 0,
        num_threads: int = 2,
        depth: int = 4,
        size_of: Callable[[T], int] | None = None,
        max_bytes: int = HELD_BYTES,
        hang_s: float = HANG_S,
    ) -> None:
        self._fetch, self._next, self._hang_s = fetch, first, hang_s
        self._depth, self._size_of, self._max_bytes, self._largest = max(depth, 1), size_of, max_bytes, 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-ahead") if num_threads else None
        self._pending: deque[Future[T]] = deque()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._pool is None:
            self._next += 1
            return self._fetch(self._next - 1)
        self._submit(self._pool, max(self._most_held(), 1))
        try:
            item = self._pending.popleft().result(self._hang_s)
        except FutureTimeoutError:
            raise ResourceError(
                f"a batch could not be read within {self._hang_s:g} s", fix="check the drive that holds the workdir."
            ) from None
        if self._size_of is not None:
            self._largest = max(self._largest, self._size_of(item))
            self._submit(self._pool, self._most_held() - 1)
        return item

    def _most_held(self) -> int:
        if self._size_of is None:
            return self._depth
        return min(self._depth, self._max_bytes // self._largest) if self._largest else 1

    def _submit(self, pool: ThreadPoolExecutor, num_pending: int) -> None:
        while len(self._pending) < num_pending:
            self._pending.append(pool.submit(self._fetch, self._next))
            self._next += 1

    def close(self) -> None:
        """Drop what was read ahead and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pending.clear()

    def __enter__(self) -> "ReadAhead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
