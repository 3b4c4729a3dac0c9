"""How much memory there is, asked before a header's numbers are believed."""

import os
import resource
from os import PathLike
from pathlib import Path

from voxdino.core.errors import SafetyError
from voxdino.core.safe_files import format_bytes

ALWAYS_ALLOWED = 256 << 20  # bytes below which nobody needs to ask
_USABLE = 0.9  # share of the free memory that one file may take


def available_memory() -> int:
    """Bytes this process can still take: the least of free memory, container limit and address space limit."""
    limits = [*_free_of_machine(), *_free_of_container(), *_free_of_process()]
    return max(0, min(limits, default=1 << 62))


def total_memory() -> int:
    """Bytes of this machine, or of its container where that has less: the same whatever else runs."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _text(f"/sys/fs/cgroup/{name}").strip()
        sizes += [int(limit)] if limit.isdigit() else []
    return min(sizes)


def require_memory(
    num_bytes: int, what: str, *, where: str | PathLike[str] | None = None, limit: int | None = None
) -> None:
    """SafetyError when `what` ("declares 512 x 512 x 90 voxels") needs more than `limit`, or than is free."""
    if limit is None and num_bytes <= ALWAYS_ALLOWED:
        return
    allowed = int(_USABLE * available_memory()) if limit is None else limit
    if num_bytes > allowed:
        fact = f"{what}, {format_bytes(num_bytes)} in memory; {format_bytes(allowed)} may be used."
        fix = "if the size is true, use a machine with more memory; else the header is wrong: export the file again."
        raise SafetyError(fact, where=where, fix=fix)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended, on the machine or on a device; torch need not be there to know its errors."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch on a GPU
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))  # torch on the CPU
    )


def _free_of_machine() -> list[int]:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return [int(line.split()[1]) * 1024]
    return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]  # not Linux: all there is


def _free_of_container() -> list[int]:
    for limit_name, used_name, stat_name in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit, used = _text(f"/sys/fs/cgroup/{limit_name}").strip(), _text(f"/sys/fs/cgroup/{used_name}").strip()
        if limit.isdigit() and used.isdigit():
            cache = [
                line.split()[1] for line in _text(f"/sys/fs/cgroup/{stat_name}").splitlines() if "inactive_file" in line
            ]
            return [int(limit) - int(used) + (int(cache[-1]) if cache else 0)]
    return []


def _free_of_process() -> list[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return []
    return [limit - int(pages[0]) * resource.getpagesize()]


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
