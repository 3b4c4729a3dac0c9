"""`voxdino`: run one command and turn whatever happens into an exit code and, on failure, one line on stderr."""

import os
import sys
from collections.abc import Sequence

from voxdino.cli.faults import AGAIN, end_on_sigterm, report
from voxdino.core.errors import EXIT_DONE, EXIT_INTERRUPTED, StoppedError

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away, as in `voxdino list | head -1`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (core/errors.py lists them; 1 is always a bug of ours)."""
    from voxdino.cli.app import app

    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"] or ["--help"]
    try:
        with end_on_sigterm():
            code = app(args=args, prog_name="voxdino", standalone_mode=False)
        sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # typer has turned the KeyboardInterrupt into a number
            raise StoppedError("stopped by Ctrl-C.", fix=AGAIN)
    except BrokenPipeError:
        return _reader_is_gone()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer turns it into exit code 1
            return _reader_is_gone()
        raise
    except BaseException as error:
        if debug:
            import traceback

            traceback.print_exception(error)
        return report(error, as_json="--json" in args)
    return EXIT_DONE


def _reader_is_gone() -> int:
    """Let the interpreter's last flush go nowhere instead of failing once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE
