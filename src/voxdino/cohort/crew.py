"""Workers on this machine: one process each, replaced when it dies."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol, runtime_checkable

from voxdino.core.errors import UsageError
from voxdino.preparation.workers import Outcome, attempt, available_cpus, end_with_parent, process_context

Answer = Literal["ready", "lost"] | Outcome[Any]

_ENOUGH_S = 5.0  # for a worker to end by itself


@runtime_checkable
class Crew(Protocol):
    """Workers that do one task. `wait` tells what happened: worker -> ready for work, lost, or the outcome of its item.

    A lost worker is replaced at once, under the same number, and says when it is ready.
    """

    @property
    def size(self) -> int: ...

    def start(self, task: Callable[[Any], Any]) -> None: ...

    def give(self, worker: int, index: int, item: Any, name: str) -> None: ...

    def wait(self, timeout_s: float) -> list[tuple[int, Answer]]: ...

    def replace(self, worker: int) -> None:
        """End a worker that hangs."""
        ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class LocalCrew:
    """See `Crew`. size: None: as many as there are processors."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size or available_cpus()
        self._workers: list[_Worker] = []
        self._task: Any = None

    def start(self, task: Callable[[Any], Any]) -> None:
        self._task = task
        self._context = process_context()
        self._workers = [self._hire() for _ in range(self.size)]

    def give(self, worker: int, index: int, item: Any, name: str) -> None:
        with suppress(OSError):  # it has just died: `wait` will say so
            self._workers[worker].pipe.send((index, item, name))

    def wait(self, timeout_s: float) -> list[tuple[int, Answer]]:
        pipes = {one.pipe: number for number, one in enumerate(self._workers)}
        sentinels = {one.process.sentinel: number for number, one in enumerate(self._workers)}
        found = wait([*pipes, *sentinels], timeout_s)
        happened = dict.fromkeys(
            [
                *(pipes[one] for one in found if isinstance(one, Connection)),
                *(sentinels[one] for one in found if isinstance(one, int)),
            ]
        )
        return [(number, self._answer(number)) for number in happened]

    def _answer(self, number: int) -> Answer:
        try:
            pipe = self._workers[number].pipe
            if pipe.poll():
                answer: Answer = pipe.recv()
                return answer
        except (EOFError, OSError):
            pass
        self.replace(number)
        return "lost"

    def replace(self, worker: int) -> None:
        _dismiss(self._workers[worker])
        self._workers[worker] = self._hire()

    def stop(self) -> None:
        for one in self._workers:
            _dismiss(one)
        self._workers = []

    def _hire(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        threads = max(1, available_cpus() // self.size)
        process = self._context.Process(target=_serve, args=(theirs, threads), daemon=True)
        process.start()
        theirs.close()
        ours.send(self._task)
        return _Worker(process, ours)


def _dismiss(worker: _Worker) -> None:
    worker.process.kill()  # files are written whole or not at all
    worker.process.join(_ENOUGH_S)
    worker.pipe.close()


def _serve(pipe: Connection, threads: int) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before the task brings torch along
    task = pipe.recv()
    pipe.send("ready")
    while True:
        index, item, name = pipe.recv()
        pipe.send(attempt(task, item, index, name))


def parse_crew(text: str, *, num_gpus: float = 0.0) -> Crew:
    """ "local", "local:4", "ray", "ray://host:10001". Errors: UsageError; ResourceError without Ray."""
    kind, _, rest = text.partition(":")
    if kind == "ray" and (not rest or rest.startswith("//")):
        from voxdino.cohort.ray_crew import RayCrew

        return RayCrew(text if rest else None, num_gpus=num_gpus)
    if kind == "local" and (text == "local" or (rest.isascii() and rest.isdigit() and int(rest) > 0)):
        return LocalCrew(int(rest) if rest else None)
    fix = "give local, local:N (processes on this machine), ray, or ray://HOST:PORT."
    raise UsageError(f"--on is '{text}'", fix=fix)
