"""A kill at any moment loses nothing: the same command goes on and ends with the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")


def run_kills(*args: str) -> str:
    done = subprocess.run([sys.executable, str(KILLS), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kill_in_each_step_leaves_everything_readable_and_the_result_the_same():
    assert run_kills("--kills", "1").count("\n") == 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_each_step():
    run_kills("--kills", "20")
