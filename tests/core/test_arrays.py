"""Compressed array files give every crop back as it was, and say when they are damaged."""

import numpy as np
import pytest

from voxdino.core.arrays import ArrayFile, write_array
from voxdino.core.errors import InputError


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [(1, 1, 8, 8), (2, 99, 99, 99), None])
def test_every_crop_comes_back(tmp_path, dtype, chunk):
    array = (np.random.default_rng(0).random((2, 5, 17, 11)) * 250).astype(dtype)
    write_array(tmp_path / "a.b2nd", array, chunk=chunk)
    file = ArrayFile.open(tmp_path / "a.b2nd")
    assert file.shape == array.shape
    assert file.dtype == array.dtype
    for box in (np.s_[:], np.s_[0], np.s_[:, 1:3, 5:16, 2:11], np.s_[1, 4, 0:1, 10:11], np.s_[:, 2:2]):
        np.testing.assert_array_equal(file[box], array[box])


def test_only_the_file_itself_is_left(tmp_path):
    write_array(tmp_path / "a.b2nd", np.zeros((2, 3)), chunk=(1, 3))
    write_array(tmp_path / "a.b2nd", np.ones((2, 3)), chunk=(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.b2nd"]
    assert ArrayFile(tmp_path / "a.b2nd")[:].min() == 1


def test_transposed_and_fortran_arrays_are_stored_as_they_look(tmp_path):
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)
    write_array(tmp_path / "a.b2nd", array, chunk=(4, 1, 3))
    np.testing.assert_array_equal(ArrayFile(tmp_path / "a.b2nd")[:], array)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "missing"])
def test_damage_is_named(tmp_path, damage):
    path = tmp_path / "a.b2nd"
    write_array(path, np.random.default_rng(0).random((4, 50, 50)), chunk=(1, 50, 50))
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "garbage":
            path.write_bytes(b"hello" * 100)
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
    with pytest.raises(InputError) as caught:
        ArrayFile(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert "Fix: " in str(caught.value)
