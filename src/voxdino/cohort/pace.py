"""How far a cohort is, told now and then: for logs of clusters, where no bar moves."""

import time
from collections.abc import Callable


class Pace:
    """A progress callback (done, total) that says "120 of 2000 cases, 36 a minute" every `every_s` seconds."""

    def __init__(self, say: Callable[[str], None], *, every_s: float = 30.0, what: str = "cases") -> None:
        self._say, self._every_s, self._what = say, every_s, what
        self._started = self._told = time.monotonic()

    def __call__(self, done: int, total: int, *_: object) -> None:
        now = time.monotonic()
        if now - self._told < self._every_s and done < total:
            return
        self._told = now
        a_minute = 60 * done / max(now - self._started, 1e-9)
        self._say(f"{done} of {total} {self._what}, {a_minute:.3g} a minute")
