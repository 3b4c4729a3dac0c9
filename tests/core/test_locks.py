"""Laws of locks: one run writes to a folder, or several parts of one; nobody waits, and the dead hold nothing."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from voxdino.core.errors import ResourceError
from voxdino.core.locks import lock_folder


def test_a_locked_folder_refuses_the_second_run_and_names_the_first(tmp_path):
    with lock_folder(tmp_path / "run"):
        second = lock_folder(tmp_path / "run")
        with pytest.raises(ResourceError, match=f"pid {os.getpid()} on {socket.gethostname()}") as caught, second:
            pass
        assert caught.value.exit_code == 4
    with lock_folder(tmp_path / "run"):
        pass


def test_a_lock_names_nobody_after_a_run_that_failed(tmp_path):
    with pytest.raises(KeyError), lock_folder(tmp_path):
        raise KeyError
    assert (tmp_path / ".lock").read_text() == ""


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = (
        "import os, sys; from voxdino.core.locks import lock_folder\n"
        "with lock_folder(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with lock_folder(tmp_path):
        pass


def test_parts_go_beside_each_other_but_not_twice(tmp_path):
    with (
        lock_folder(tmp_path, part="1of2"),
        lock_folder(tmp_path, part="2of2"),
        pytest.raises(ResourceError, match="another run"),
        lock_folder(tmp_path, part="1of2"),
    ):
        pass


@pytest.mark.parametrize("order", [("", "1of2"), ("1of2", "")], ids=["part after whole", "whole after part"])
def test_a_part_and_the_whole_exclude_each_other_and_the_first_is_named(tmp_path, order):
    first, second = order
    with lock_folder(tmp_path, part=first):
        with (
            pytest.raises(ResourceError, match=f"in this folder \\(pid {os.getpid()} on ") as caught,
            lock_folder(tmp_path, part=second),
        ):
            pass
        assert str(caught.value.where) == str(tmp_path) and "wait for it to end" in caught.value.fix
    with lock_folder(tmp_path, part=second):
        pass


def test_the_whole_is_free_only_when_the_last_part_has_ended(tmp_path):
    with ExitStack() as parts:
        for number in (1, 2):
            parts.enter_context(lock_folder(tmp_path, part=f"{number}of2"))
        with lock_folder(tmp_path, part="3of3"):
            pass  # its end frees nothing that the others hold
        with pytest.raises(ResourceError), lock_folder(tmp_path):
            pass


def test_a_refusal_comes_at_once_and_waiting_has_to_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("voxdino.core.locks._LOOK_AGAIN_S", 0.01)
    held, freed = threading.Event(), []

    def hold():
        with lock_folder(tmp_path, part="plan"):
            held.set()
            time.sleep(0.1)
            freed.append(True)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with pytest.raises(ResourceError), lock_folder(tmp_path, part="plan"):
        pass
    assert not freed
    with lock_folder(tmp_path, part="plan", wait_s=60.0):
        assert freed
    other.join()


def test_a_refusal_names_those_who_hold_the_lock_and_not_the_dead(tmp_path):
    code = (
        "import os, sys; from voxdino.core.locks import lock_folder\n"
        "with lock_folder(sys.argv[1], part='1of2'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / ".lock-1of2").read_text()  # it had no time to take its name away
    me = f"\\(pid {os.getpid()} on {socket.gethostname()}\\)"
    with lock_folder(tmp_path, part="2of2"), pytest.raises(ResourceError, match=me), lock_folder(tmp_path):
        pass


def test_a_refused_part_names_who_has_this_part_and_no_other(tmp_path):
    with lock_folder(tmp_path, part="1of2"), lock_folder(tmp_path, part="2of2"):
        (tmp_path / ".lock-2of2").write_text("somebody else\n")
        with pytest.raises(ResourceError, match=rf"\(pid {os.getpid()} on [^,]*\)"), lock_folder(tmp_path, part="1of2"):
            pass


def test_runs_that_write_different_files_of_a_folder_go_beside_each_other(tmp_path):
    with lock_folder(tmp_path, file="a.json"), lock_folder(tmp_path, file="b.json", part="1of2"):
        for file in ("a.json", "b.json"):
            with pytest.raises(ResourceError, match=f"pid {os.getpid()}"), lock_folder(tmp_path, file=file):
                pass


def test_who_waits_says_once_for_whom(tmp_path, monkeypatch):
    monkeypatch.setattr("voxdino.core.locks._LOOK_AGAIN_S", 0.01)
    told = []
    with (
        lock_folder(tmp_path, part="plan"),
        pytest.raises(ResourceError),
        lock_folder(tmp_path, part="plan", wait_s=0.1, on_wait=told.append),
    ):
        pass
    assert told == [f"waiting for another run in {tmp_path} (pid {os.getpid()} on {socket.gethostname()})"]
    with lock_folder(tmp_path, part="plan", wait_s=0.1, on_wait=told.append):
        assert len(told) == 1
