"""Every bad input of the catalogue ends with its exit code and one line: the file, the fact, the fix; no traceback."""

import json
import subprocess
import sys

import pytest
from bad_inputs import CATALOGUE

from voxdino.cli import main

IN_A_PROCESS = [case for case in CATALOGUE if case.name.startswith(("A1 gzip cut in", "A7", "D9 trailing", "G1"))]


@pytest.mark.parametrize("case", CATALOGUE, ids=lambda case: case.name)
def test_a_bad_input_is_named_explained_and_left_alone(case, tmp_path, capsys):
    args = case.args(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(args) == case.code, capsys.readouterr().err
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1 and told.startswith("voxdino: ") and "Traceback" not in told
    assert all(word in told for word in case.words) and " Fix: " in told, told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", IN_A_PROCESS, ids=lambda case: case.name)
def test_the_same_as_a_process_and_as_json(case, tmp_path):
    code = f"import sys; from voxdino.cli import main; sys.exit(main({[*case.args(tmp_path), '--json']}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == case.code and len(done.stderr.strip().splitlines()) == 1
    assert json.loads(done.stdout)["error"]["exit_code"] == case.code
    assert not (tmp_path / "canary").exists()


def test_the_catalogue_has_the_size_promised():
    assert len(CATALOGUE) >= 40
