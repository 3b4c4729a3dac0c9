"""Faults of the machine while predicting: memory limits, full disks, read-only folders (F4, E1, E4, E5)."""

import gzip
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import make_volume

from voxdino.core.io import read_label_map, write_volume
from voxdino.core.io.nifti import read_fields

GIB = 1 << 30


def voxdino(*args: str | Path, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "voxdino", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=before)


def declare(path: Path, shape: tuple[int, int, int]) -> None:
    """A NIfTI file that says it has `shape`; its voxels are never read, as the need is known from the header."""
    write_volume(path.with_suffix(".nii"), make_volume())
    fields = read_fields(path.with_suffix(".nii")).fields
    fields.set_data_shape(shape)
    packed = gzip.compress(fields.binaryblock + bytes(4 + (1 << 20)))
    path.write_bytes(packed + packed)
    path.with_suffix(".nii").unlink()


def test_what_cannot_fit_under_a_memory_limit_ends_before_the_work_with_need_and_limit(run_folder, tmp_path):
    image = tmp_path / "whole_body.nii.gz"
    declare(image, (512, 512, 2000))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))

    out = tmp_path / "out"
    ended = voxdino("predict", image, "--run", run_folder, "--out", out, "--device", "cpu", before=limit)
    assert ended.returncode == 4, ended.stderr
    assert "512 x 512 x 2000 voxels need about 4.9 GiB" in ended.stderr and "are free" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(out.glob("*.nii.gz"))


def noise(path: Path, shape=(40, 40, 12), seed=0) -> None:
    write_volume(path, make_volume(shape, seed=seed))


@pytest.fixture
def small_disk(tmp_path):
    """A mounted folder of 96 KiB; skipped where nothing may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_with_4_keeps_what_is_whole_and_goes_on_once_there_is_space(
    model, small_disk, tmp_path
):
    from voxdino.core.errors import ResourceError
    from voxdino.inference.cases import find_cases
    from voxdino.inference.run import predict_cases

    for number in range(3):
        noise(tmp_path / "in" / f"c{number}.nii.gz", (9, 11, 6), number)
    cases = find_cases([tmp_path / "in"])
    whole = predict_cases(cases, model, tmp_path / "whole").record
    out = small_disk / "out"
    predict_cases(cases[:1], model, out)
    filler = small_disk / "filler"
    descriptor = os.open(filler, os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(descriptor, bytes(512))
    os.close(descriptor)
    with pytest.raises(ResourceError, match="disk is full"):
        predict_cases(cases, model, out)
    assert {path.name for path in out.glob("*.nii.gz")} == {"c0.nii.gz"}
    expected = read_label_map(tmp_path / "whole" / "c0.nii.gz").array
    np.testing.assert_array_equal(read_label_map(out / "c0.nii.gz").array, expected)
    filler.unlink()
    assert predict_cases(cases, model, out).record == whole


def test_a_folder_that_cannot_be_written_is_refused_before_any_pass_of_the_network(
    model, small_disk, tmp_path, monkeypatch
):
    from voxdino.core.errors import ResourceError
    from voxdino.inference import team
    from voxdino.inference.cases import find_cases
    from voxdino.inference.run import predict_cases

    noise(tmp_path / "c.nii.gz", (9, 11, 6))
    (small_disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(team, "predict_volume", None)
    with pytest.raises(ResourceError):
        predict_cases(find_cases([tmp_path / "c.nii.gz"]), model, small_disk / "out")


def test_a_limit_on_the_size_of_files_ends_with_4_and_leaves_no_half_file(run_folder, tmp_path):
    noise(tmp_path / "c.nii", (40, 40, 12))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    out = tmp_path / "out"
    ended = voxdino(
        "predict", tmp_path / "c.nii", "--run", run_folder, "--out", out, "--fast", "--device", "cpu", before=limit
    )
    assert ended.returncode == 4, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(out.glob("*.nii"))
