"""Many cases over several processes: results as they come, real errors by case, a dead or hanging worker is noticed."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from voxdino.core.errors import ImageError, ResourceError, VoxdinoError
from voxdino.core.memory import available_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

STALL_AFTER_S = 900.0  # no case takes so long; a worker that does hangs (dead network drive)
_SMALL_BYTES = 2_000_000  # files below which starting processes costs more than it brings
_MEMORY_PER_BYTE = 12  # memory that a case takes in work, per byte of its (mostly compressed) files
_PRELOAD = ["voxdino.preparation.check", "voxdino.preparation.prepare"]


@dataclass(frozen=True)
class Fault:
    """Why a case failed. error: one of ours; details: the traceback in the worker, for --debug."""

    error: VoxdinoError
    details: str


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of item number `index`: a value or a fault, never both."""

    index: int
    value: Result | None
    fault: Fault | None


@runtime_checkable
class OverCases(Protocol):
    """Runs a task over cases: `run_over_cases`, or over a cluster."""

    def __call__(
        self,
        task: Callable[[Item], Result],
        items: Sequence[Item],
        names: Sequence[str],
        *,
        num_workers: int | None = None,
        sizes: Sequence[int] = (),
        workers_per_cpu: int = 1,
        on_started: Callable[[], None] | None = None,
    ) -> Generator[Outcome[Result], None, None]: ...


def run_over_cases(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    names: Sequence[str],
    *,
    num_workers: int | None = None,
    sizes: Sequence[int] = (),
    workers_per_cpu: int = 1,
    on_started: Callable[[], None] | None = None,
) -> Generator[Outcome[Result], None, None]:
    """`task(item)` for every item, in order of completion. Use it with `contextlib.closing`: it ends the workers.

    names:      how messages call the items (case ids).
    sizes:      bytes of the files to read, per item. Where num_workers is None, little work stays in this process, and
                large cases get no more workers than the memory holds.
    workers_per_cpu: 2 where a case waits for the disk as long as it computes.
    on_started: called once the workers run, before the first case. Take locks there: forked workers must not
                inherit them.

    A case that raises becomes a `Fault`. Errors: ResourceError when a worker was killed or hangs (naming the cases in
    work), or when the disk is full (of the task's own).
    """
    if num_workers is None:
        num_workers = _suitable_workers(sizes, workers_per_cpu)
    num_workers = min(num_workers, len(items))
    if num_workers <= 1:
        if on_started is not None:
            on_started()
        outcomes = (attempt(task, item, index, names[index]) for index, item in enumerate(items))
    else:
        outcomes = _run_in_pool(task, items, names, num_workers, on_started)
    with closing(outcomes):
        for outcome in outcomes:
            if outcome.fault is not None and isinstance(outcome.fault.error, ResourceError):
                raise outcome.fault.error  # a full disk fails every case
            yield outcome


def _run_in_pool(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    names: Sequence[str],
    num_workers: int,
    on_started: Callable[[], None] | None,
) -> Generator[Outcome[Result], None, None]:
    context = process_context()
    slots = context.Array("i", [-1] * num_workers)  # per worker, the index of the case in work
    turn = context.Value("i", 0)
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, (slots, turn, os.getpid()))
    running: set[Future[Outcome[Result]]] = set()
    waiting = iter(range(len(items)))
    clean = False
    try:
        executor.submit(os.getpid).result()
        if on_started is not None:
            on_started()
        while True:
            while len(running) < 2 * num_workers and (index := next(waiting, None)) is not None:
                running.add(executor.submit(_work, task, items[index], index, names[index]))
            if not running:
                break
            done, running = wait(running, timeout=STALL_AFTER_S, return_when=FIRST_COMPLETED)
            if not done:
                raise _lost(f"no case was finished in {STALL_AFTER_S / 60:.0f} minutes", slots, names)
            for future in done:
                yield future.result()
        clean = True
    except BrokenProcessPool:
        raise _lost("a worker process was killed (often: out of memory)", slots, names) from None
    finally:
        if not clean:
            _kill(executor)
        executor.shutdown(wait=True, cancel_futures=True)


def _lost(what: str, slots: Any, names: Sequence[str]) -> ResourceError:
    cases = ", ".join(names[index] for index in slots if index >= 0) or "none"
    return ResourceError(
        f"{what}; cases in work: {cases}.",
        fix="free memory, or use fewer workers (--workers 1 shows the case that fails).",
    )


def _kill(executor: ProcessPoolExecutor) -> None:
    """End the workers at once: every file they write comes to be whole or not at all."""
    for process in list((executor._processes or {}).values()):
        with suppress(OSError, ValueError):
            process.kill()


_slots: Any = None  # in a worker: the shared array of cases in work
_slot = -1  # in a worker: its own place there


def _start_worker(slots: Any, turn: Any, parent: int) -> None:
    global _slots, _slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with turn.get_lock():
        _slot = turn.value
        turn.value += 1
    _slots = slots
    end_with_parent()


def end_with_parent() -> None:
    """In a worker: end when the process that started it does, however it ends."""
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()


def _follow_parent(parent: int) -> None:
    """End with the parent: a worker that outlives a killed run would hold its lock and its memory."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _work(task: Callable[[Item], Result], item: Item, index: int, name: str) -> Outcome[Result]:
    _slots[_slot] = index
    outcome = attempt(task, item, index, name)
    _slots[_slot] = -1
    return outcome


def attempt(task: Callable[[Item], Result], item: Item, index: int, name: str) -> Outcome[Result]:
    """The task's result, or what it raised as the fault of this item."""
    try:
        return Outcome(index, task(item), None)
    except VoxdinoError as error:
        error.where = error.where or name
        return Outcome(index, None, Fault(error, traceback.format_exc()))
    except MemoryError:
        fix = "use fewer workers, or a machine with more memory."
        return Outcome(
            index, None, Fault(ResourceError("memory ran out.", where=name, fix=fix), traceback.format_exc())
        )
    except Exception as failure:
        fact = f"could not be read: {type(failure).__name__}: {str(failure)[:200] or 'no message'}."
        fix = "export the case again, or remove it; --debug shows the details."
        return Outcome(index, None, Fault(ImageError(fact, where=name, fix=fix), traceback.format_exc()))


def process_context() -> Any:
    """fork is fastest, and safe only before threads and torch are there; else a server that loads our modules once."""
    methods = multiprocessing.get_all_start_methods()
    if "fork" in methods and sys.platform == "linux" and "torch" not in sys.modules and threading.active_count() == 1:
        return multiprocessing.get_context("fork")
    if "forkserver" in methods:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        return context
    return multiprocessing.get_context("spawn")


def _suitable_workers(sizes: Sequence[int], per_cpu: int = 1) -> int:
    if sizes and sum(sizes) < _SMALL_BYTES:
        return 1
    held = available_memory() // (_MEMORY_PER_BYTE * max(sizes, default=0) + 1)
    return max(1, min(per_cpu * available_cpus(), held))


def file_bytes(files: Sequence[Path]) -> int:
    """Size of some files together, of folders with all below; a missing one counts nothing."""
    total = 0
    for path in files:
        with suppress(OSError, ValueError):
            inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            total += sum(file.stat().st_size for file in inside)
    return total


def available_cpus() -> int:
    """Processors that this process may use: affinity and container limits counted."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count
