"""Who does which case: each goes to a worker, again to another where that one is lost, aside after two tries."""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from voxdino.cohort.crew import Answer, Crew
from voxdino.core.errors import ImageError, ResourceError
from voxdino.preparation.workers import STALL_AFTER_S, Fault, Outcome

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIES = 2
MOST_IN_A_ROW = 3  # cases set aside for want of resources, or workers lost before they were ready: then it is not them
_LOOK_EVERY_S = 5.0


@dataclass
class _Work:
    """A case in work. since: when it was given out."""

    index: int
    tries: int
    since: float


@dataclass(frozen=True)
class Cohort:
    """`run_over_cases` on a crew: outcomes as they come, each case's exactly once.

    A case whose worker dies or hangs, or lacks memory or disk, is tried once more, last of all and most likely by
    another worker; then it is set aside with a fault that says so. on_note(text): for every lost worker.
    stall_after_s: a case that takes longer hangs (dead network drive), and its worker is lost.
    """

    crew: Crew
    on_note: Callable[[str], None] | None = None
    stall_after_s: float = STALL_AFTER_S

    def over_cases(
        self,
        task: Callable[[Item], Result],
        items: Sequence[Item],
        names: Sequence[str],
        *,
        on_started: Callable[[], None] | None = None,
        **_: object,
    ) -> Generator[Outcome[Result], None, None]:
        """See `run_over_cases`; how many workers there are is the crew's business.

        Errors: ResourceError where one case after the other ends for want of resources (three set aside, or as many
        tries in a row as three per worker), or no worker starts.
        """
        waiting = deque(_Work(index, 1, 0.0) for index in range(len(items)))
        busy: dict[int, _Work] = {}
        idle: set[int] = set()
        wanting = in_a_row = unstarted = 0
        most = MOST_IN_A_ROW * max(TRIES, self.crew.size)
        try:
            self.crew.start(task)
            if on_started is not None:
                on_started()
            while waiting or busy:
                while idle and waiting:
                    worker, work = idle.pop(), waiting.popleft()
                    busy[worker] = replace(work, since=time.monotonic())
                    self.crew.give(worker, work.index, items[work.index], names[work.index])
                for worker, answer, given in self._ended(busy):
                    if answer == "lost":
                        unstarted += given is None and worker not in idle
                        idle.discard(worker)
                    else:
                        unstarted = 0
                        idle.add(worker)
                    _require_starts(unstarted)
                    if given is None:  # nothing was asked of it
                        continue
                    outcome = self._outcome(answer, given, names)
                    wanting = wanting + 1 if _is_for_want(outcome) else 0
                    _require_hope(wanting < most, outcome)
                    if _is_for_want(outcome) and given.tries < TRIES:
                        waiting.append(replace(given, tries=given.tries + 1))
                        continue
                    in_a_row = in_a_row + 1 if _is_for_want(outcome) else 0
                    _require_hope(in_a_row < MOST_IN_A_ROW, outcome)
                    yield _set_aside(outcome)
        finally:
            self.crew.stop()

    def _outcome(self, answer: Any, given: _Work, names: Sequence[str]) -> Outcome[Any]:
        if answer != "lost":
            outcome: Outcome[Any] = answer
            return outcome
        name = names[given.index]
        if self.on_note:
            ends = "it is tried again" if given.tries < TRIES else "for the second time: it is set aside"
            self.on_note(f"a worker was lost with {name}; {ends}")
        fact = f"ended its worker {TRIES} times (killed, often for want of memory)."
        error = ResourceError(fact, where=name, fix="predict (prepare) it alone on a machine with more memory.")
        return Outcome(given.index, None, Fault(error, ""))

    def _ended(self, busy: dict[int, _Work]) -> list[tuple[int, Answer, _Work | None]]:
        """What happened, with the case that it was about, which is taken out of `busy`. Who hangs counts as lost."""
        answers = self.crew.wait(_LOOK_EVERY_S)
        ended = [(worker, answer, None if answer == "ready" else busy.pop(worker, None)) for worker, answer in answers]
        hanging = [worker for worker, work in busy.items() if time.monotonic() - work.since > self.stall_after_s]
        for worker in hanging:
            self.crew.replace(worker)
            ended.append((worker, "lost", busy.pop(worker)))
        return ended


def _is_for_want(outcome: Outcome[Any]) -> bool:
    """Of memory, disk or life: not the case's own fault, as far as one can tell."""
    return outcome.fault is not None and isinstance(outcome.fault.error, ResourceError)


def _set_aside(outcome: Outcome[Result]) -> Outcome[Result]:
    """What stops a run on one machine is here the fault of this case."""
    if outcome.fault is None or not isinstance(outcome.fault.error, ResourceError):
        return outcome
    error = outcome.fault.error
    fault = Fault(ImageError(error.fact, where=error.where, fix=error.fix), outcome.fault.details)
    return replace(outcome, fault=fault)


def _require_hope(there_is: bool, outcome: Outcome[Any]) -> None:
    if not there_is and outcome.fault is not None:
        raise outcome.fault.error


def _require_starts(unstarted: int) -> None:
    if unstarted >= MOST_IN_A_ROW:
        raise ResourceError("no worker starts: one after the other ends.", fix="try --on local:1 with --debug.")
