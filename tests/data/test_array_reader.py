"""Array files: what was written is read, from many threads; what was changed is never used."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from voxdino.core.arrays import write_array
from voxdino.core.errors import DatasetError
from voxdino.core.safe_files import Manifest
from voxdino.data import array_reader
from voxdino.data.array_reader import ArrayReader

BOX = (slice(1, 3), slice(2, 7))


@pytest.fixture
def array(tmp_path):
    values = np.random.default_rng(0).integers(0, 1000, (5, 9)).astype(np.int16)
    write_array(tmp_path / "a.b2nd", values, chunk=(2, 9))
    return values


@pytest.fixture(params=["small", "large", "no room"])
def size(request, monkeypatch):
    """Arrays up to a limit are kept, as long as there is room."""
    if request.param != "small":
        monkeypatch.setattr(array_reader, {"large": "KEPT_ARRAY_BYTES", "no room": "KEPT_BYTES"}[request.param], 89)
    return request.param


@pytest.mark.parametrize("compared", ["all", "kept"])
def test_boxes_are_those_of_the_array_from_any_thread(array, size, compared, tmp_path):
    reader, manifest = ArrayReader(compared=compared, fix="again."), Manifest.of(tmp_path, ["a.b2nd"])
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: reader.read(manifest, tmp_path, "a.b2nd", BOX), range(20)))
    assert all(np.array_equal(one, array[BOX]) for one in found)
    assert found[-1].flags.writeable is (size != "small")


@pytest.mark.parametrize("compared", ["all", "kept"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "other bytes"])
def test_what_was_changed_is_never_used(array, size, compared, damage, tmp_path):
    path = tmp_path / "a.b2nd"
    reader, manifest = ArrayReader(compared=compared, fix="make it anew."), Manifest.of(tmp_path, [path.name])
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "shorter" else data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "other bytes" and compared == "kept" and size != "small":
        reader.read(manifest, tmp_path, path.name, BOX)  # is not read whole: only its size is known
        return
    with pytest.raises(DatasetError, match=r"a\.b2nd: .*make it anew"):
        reader.read(manifest, tmp_path, path.name, BOX)
