"""Sizes are believed only up to the memory there is."""

import pytest

from voxdino.core import memory
from voxdino.core.errors import SafetyError
from voxdino.core.memory import available_memory, require_memory, total_memory


def test_there_is_some_memory():
    assert 0 < available_memory() <= total_memory() < 1 << 60


def test_sizes_over_the_free_memory_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    require_memory(900 << 20, "declares 9 voxels")
    with pytest.raises(SafetyError, match=r"a\.nii: declares 9 voxels, 2\.0 GiB in memory; 921\.6 MiB may") as caught:
        require_memory(2 << 30, "declares 9 voxels", where="a.nii")
    assert caught.value.exit_code == 5


def test_a_given_limit_counts_also_for_small_sizes():
    require_memory(100, "declares 100 voxels", limit=100)
    with pytest.raises(SafetyError):
        require_memory(101, "declares 101 voxels", limit=100)


def test_the_container_limit_counts(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4194304 kB\n",
        "/sys/fs/cgroup/memory.max": "2147483648\n",
        "/sys/fs/cgroup/memory.current": "1610612736\n",
        "/sys/fs/cgroup/memory.stat": "active_file 5\ninactive_file 536870912\n",
    }
    monkeypatch.setattr(memory, "_text", lambda path: files.get(path, ""))
    assert available_memory() == 1 << 30
    assert total_memory() <= 2 << 30
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_memory() == 4 << 30
