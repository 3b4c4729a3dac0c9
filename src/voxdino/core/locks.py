"""Who may write to a folder: one run, or several that each have a part of the work."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from os import PathLike
from pathlib import Path

from voxdino.core.errors import ResourceError
from voxdino.core.safe_files import storage_error

LOCK_NAME = ".lock"

_LOOK_AGAIN_S = 0.5


@contextmanager
def lock_folder(
    folder: str | PathLike[str],
    *,
    file: str = "",
    part: str = "",
    wait_s: float = 0.0,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Hold the only writer's lock of `folder`; or of a `part` of the work on it, beside other parts.

    A run on the whole folder and one on a part exclude each other. The kernel frees a lock when the process dies,
    however it dies.

    file: what is locked is the work on this one file of the folder, beside runs that write others.
    wait_s: try for so long, where another part makes what this one needs too. Everything else is refused at once: of
    processes that never wait for each other's locks none can wait for ever.
    on_wait: told once whom it waits for.
    Errors: ResourceError naming pid and host of the run that holds it.
    """
    until = time.monotonic() + wait_s
    whole = Path(folder) / (f".{file}{LOCK_NAME}" if file else LOCK_NAME)
    told = False
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(_hold(whole, shared=bool(part)))
                if part:
                    stack.enter_context(_hold(_of_part(whole, part)))
            except BlockingIOError:
                if time.monotonic() >= until:
                    fact = f"another run works in this folder ({_holders(whole, part)})."
                    fix = "wait for it to end, stop it, or use another folder."
                    raise ResourceError(fact, where=folder, fix=fix) from None
                if not told:
                    on_wait(f"waiting for another run in {folder} ({_holders(whole, part)})")
                    told = True
            else:
                yield
                return
        time.sleep(_LOOK_AGAIN_S)


def _of_part(whole: Path, part: str) -> Path:
    return whole.with_name(f"{whole.name}-{part}")


@contextmanager
def _hold(path: Path, *, shared: bool = False) -> Iterator[None]:
    """A lock on a file, and the name of who has it in the file. shared: others may have it too; nobody is named then.

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


def _holders(whole: Path, part: str) -> str:
    """Who has the whole, or this part, or (of the whole) any part. Names that dead processes left do not count."""
    parts = [_of_part(whole, part)] if part else sorted(whole.parent.glob(f"{escape(whole.name)}-*"))
    told = []
    for path in (whole, *parts):
        with suppress(OSError), path.open("rb") as file:
            if name := file.read(200).decode("utf-8", "replace").strip():
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # free again when the file is closed
                except BlockingIOError:
                    told.append(name)
    return ", ".join(told) or "unknown"
