"""From any exception to the one line that a user reads: `where: fact Fix: fix`, and its exit code."""

import errno
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from voxdino.core.errors import InputError, ResourceError, StoppedError, UsageError, VoxdinoError
from voxdino.core.memory import is_out_of_memory

AGAIN = "run the same command again to continue."
REFUSED_BY_THE_SYSTEM = {
    errno.ENOSPC: f"free disk space or choose another --workdir, then {AGAIN}",
    errno.EDQUOT: f"free space in your quota or choose another --workdir, then {AGAIN}",
    errno.EFBIG: f"raise the file-size limit (ulimit -f), then {AGAIN}",
    errno.EROFS: "choose a folder that can be written.",
    errno.EACCES: "change the permissions or choose another folder.",
    errno.EPERM: "change the permissions or choose another folder.",
    errno.EMFILE: "raise the limit of open files (ulimit -n) or use fewer --workers.",
    errno.ENFILE: "close other programs or use fewer --workers.",
    errno.ENOMEM: "free memory or use fewer --workers.",
    errno.EAGAIN: "free memory or use fewer --workers.",
    errno.EIO: f"check the disk, then {AGAIN}",
    errno.EXDEV: "choose an output folder on one file system.",
    errno.ENAMETOOLONG: "choose a shorter path.",
}


class PartlyFailedError(Exception):
    """A command failed and yet has a result, for some cases or in part: with --json both are one document."""

    def __init__(self, error: VoxdinoError, result: dict[str, Any]) -> None:
        super().__init__(str(error))
        self.error = error
        self.result = result


def describe(error: BaseException) -> VoxdinoError:
    """The error a user reads: ours as it is; misuse 2, a wrong path 3, the environment 4; anything else is our bug."""
    if isinstance(error, VoxdinoError):
        return error
    if isinstance(error, PartlyFailedError):
        return error.error
    if hasattr(error, "format_message"):  # typer's own: misspelt commands and options, missing or bad values
        return _misuse(error)
    if isinstance(error, KeyboardInterrupt):
        return StoppedError("stopped by Ctrl-C.", fix=AGAIN)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) and error.filename is not None:
        return InputError(f"{_reason(error)}.", where=str(error.filename), fix="check the path.")
    if isinstance(error, OSError) and error.errno in REFUSED_BY_THE_SYSTEM:
        where = None if error.filename is None else str(error.filename)
        return ResourceError(f"{_reason(error)}.", where=where, fix=REFUSED_BY_THE_SYSTEM[error.errno])
    if is_out_of_memory(error):
        return ResourceError(
            f"out of memory ({error})." if str(error) else "out of memory.",
            fix="use fewer --workers, a smaller batch (--set plan.batch_size=...; of voxdino pretrain: --batch, or "
            "--set stages.0.accumulate=...) or a machine with more memory.",
        )
    if type(error).__name__ == "BrokenProcessPool":
        return ResourceError(
            "a worker process was killed, most often because memory ran out.",
            fix="run the same command again with --workers 1.",
        )
    return VoxdinoError(
        f"this is a bug in voxdino ({type(error).__name__}: {error}).",
        fix="run the same command with --debug for the traceback, and report it with the output of voxdino doctor.",
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _misuse(error: BaseException) -> UsageError:
    command = getattr(getattr(error, "ctx", None), "command_path", "voxdino")
    known = getattr(error, "possibilities", None)
    told = error.format_message()  # type: ignore[attr-defined]  # duck-typed: typer's class is private
    fact = f"{error}. Did you mean {known[0]}?" if known else told
    return UsageError(fact, where=command, fix=f"{command} --help lists what there is.")


def one_line(error: VoxdinoError) -> str:
    """`where: fact. Fix: fix.` without line breaks."""
    fact = error.fact if error.fact.endswith((".", "?", "!")) else f"{error.fact}."
    return " ".join(str(type(error)(fact, where=error.where, fix=error.fix)).split())


def report(error: BaseException, *, as_json: bool) -> int:
    """Print the error: one line on stderr, and with --json an object on stdout. Returns its exit code."""
    told = describe(error)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        if as_json:
            result = error.result if isinstance(error, PartlyFailedError) else {}
            parts = {"where": told.where, "fact": told.fact, "fix": told.fix, "exit_code": told.exit_code}
            print(json.dumps({**result, "error": parts}, indent=1, allow_nan=False), flush=True)
    with suppress(BrokenPipeError):
        print(f"voxdino: {one_line(told)}", file=sys.stderr, flush=True)
    return told.exit_code


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into StoppedError (143), so that open files are cleaned up; the handler before is restored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped by SIGTERM.", signal_number=number, fix=AGAIN)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
