"""Who may write to a folder: one run, or several that each have a part of the work."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path

from voxdino.core.errors import ResourceError
from voxdino.core.safe_files import storage_error

LOCK_NAME = ".lock"

_LOOK_AGAIN_S = 0.5


@contextmanager
def lock_folder(folder: str | PathLike[str], *, part: str = "", wait_s: float = 0.0) -> Iterator[None]:
    """Hold the only writer's lock of `folder`; or of a `part` of the work on it, beside other parts.

    A run on the whole folder and one on a part exclude each other. The kernel frees a lock when the process dies,
    however it dies.

    wait_s: try for so long, where another part makes what this one needs too. Everything else is refused at once: of
    processes that never wait for each other's locks none can wait for ever.
    Errors: ResourceError naming pid and host of the run that holds it.
    """
    until = time.monotonic() + wait_s
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(_hold(Path(folder) / LOCK_NAME, shared=bool(part)))
                if part:
                    stack.enter_context(_hold(Path(folder) / f"{LOCK_NAME}-{part}"))
            except BlockingIOError:
                if time.monotonic() >= until:
                    fact = f"another run works in this folder ({_holders(Path(folder))})."
                    fix = "wait for it to end, stop it, or use another folder."
                    raise ResourceError(fact, where=folder, fix=fix) from None
            else:
                yield
                return
        time.sleep(_LOOK_AGAIN_S)


@contextmanager
def _hold(path: Path, *, shared: bool = False) -> Iterator[None]:
    """A lock on a file. shared: beside others that share it; only those that do not write their name into it.

    Errors: BlockingIOError where another process has it; ResourceError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            if not shared:
                os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError:
            raise
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holders(folder: Path) -> str:
    """Who has said that it works on the folder or on parts of it."""
    told = []
    for path in sorted(folder.glob(f"{LOCK_NAME}*")):
        with suppress(OSError):
            told.append(path.read_bytes()[:200].decode("utf-8", "replace").strip())
    return ", ".join(filter(None, told)) or "unknown"
