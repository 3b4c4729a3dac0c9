"""Ctrl-C and SIGTERM: the first asks for a safe stop, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from voxdino.core.errors import StoppedError

GO_ON = "the same command goes on from there."
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """signal_number: of the signal that asked to stop; None: go on."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def error(self, told: str, *, where: Path) -> StoppedError:
        """What to raise once it is safe to stop. told: where the run stands, after "stopped by signal 15"."""
        number = self.signal_number or signal.SIGINT.value
        fact = f"stopped by signal {number} {told}"
        return StoppedError(fact, signal_number=number, where=str(where), fix=GO_ON)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM only marks the request; the second acts as if we were not here.

    Outside the main thread signals cannot be caught: the request then stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        restore()

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()
