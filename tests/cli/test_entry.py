"""The command line as a whole: quick help, nearest names, one line on stderr, exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from voxdino.cli import app as app_module
from voxdino.cli import main
from voxdino.cli.faults import describe
from voxdino.core.errors import ImageError, SafetyError

ROAD = ["run", "check", "prepare", "finetune", "predict", "evaluate"]
COMMANDS = [
    *ROAD,
    "tune",
    "export",
    "report",
    "benchmark",
    "pool",
    "pretrain",
    "demo",
    "data",
    "weights",
    "list",
    "doctor",
]
HEAVY = ["torch", "numpy", "nibabel", "blosc2", "SimpleITK", "matplotlib", "safetensors"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["--version"], ["chekc"]], ids=" ".join)
def test_help_and_misuse_import_nothing_heavy(args):
    code = f"import sys; from voxdino.cli import main; main({args}); print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_there_for_every_command(args, capsys):
    assert main(args) == 0
    assert "Usage: voxdino" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, near",
    [
        (["chekc"], "'check'"),
        (["evalute"], "'evaluate'"),
        (["run", "x", "--worker", "1"], "--workers"),
        (["prepare", "x", "--worksdir", "y"], "--workdir"),
        (["list", "--josn"], "--json"),
        (["weights", "pul"], "'pull'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_names_end_with_2_and_name_the_nearest(args, near, capsys):
    assert main(args) == 2
    shown = capsys.readouterr()
    assert f"Did you mean {near}" in shown.err and "Fix: voxdino" in shown.err
    assert len(shown.err.strip().splitlines()) == 1 and not shown.out


@pytest.mark.parametrize(
    "args",
    [["run"], ["run", "a", "b"], ["list", "colours"], ["run", "x", "--workers", "0"], ["run", "x", "--device", "tpu"]],
    ids=" ".join,
)
def test_misuse_ends_with_2_and_one_line(args, capsys):
    assert main(args) == 2
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1 and "Fix:" in shown.err


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ImageError("truncated.", where="a.nii", fix="copy it again."), 3, "a.nii: truncated. Fix: copy it again."),
        (SafetyError("leaves the folder.", fix="no."), 5, "leaves the folder."),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
        (FileNotFoundError(2, "No such file or directory", "gone.nii"), 3, "gone.nii"),
        (OSError(28, "No space left on device", "out.nii"), 4, "out.nii"),
        (PermissionError(13, "Permission denied", "out.nii"), 4, "permission denied"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 4, "out of memory"),
        (ValueError("two\nlines"), 1, "this is a bug in voxdino (ValueError: two lines). Fix: run the same command"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_every_fault_is_one_line_and_a_code(error, code, words, as_json, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("voxdino.cli.listing._entries", fail)
    assert main(["list", *(["--json"] if as_json else [])]) == code
    shown = capsys.readouterr()
    assert words in shown.err and len(shown.err.strip().splitlines()) == 1 and "Traceback" not in shown.err
    if as_json:
        told = json.loads(shown.out)["error"]
        assert told["exit_code"] == code and told["fact"] == describe(error).fact
    else:
        assert not shown.out


def test_debug_shows_the_traceback_too(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ImageError("truncated.", where="a.nii")

    monkeypatch.setattr("voxdino.cli.listing._entries", fail)
    assert main(["list", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_ends_with_143_and_the_handler_before_is_back(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("voxdino.cli.listing._entries", lambda table: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["list"]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_quietly_with_141():
    code = "import sys; from voxdino.cli import main; sys.exit(main(['list']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_every_command_is_in_the_table():
    names = [command.name for command in app_module.app.registered_commands]
    assert sorted(COMMANDS) == sorted(names + [group.name for group in app_module.app.registered_groups])
