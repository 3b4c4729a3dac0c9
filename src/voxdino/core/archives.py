"""Tar files unpacked by our own rules: plain files and folders alone, inside the target, bounded, whole or not at all.

Python's own extraction is not used: its filters have been escaped from (spec: reliability, G5 to G7).
"""

import errno
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from voxdino.core.errors import ImageError, SafetyError
from voxdino.core.safe_files import TEMPORARY_PREFIX, require_free_space, require_inside, storage_error

MAX_MEMBERS = 100_000
UNPACKING = ".unpacking"  # ends the names of folders that are not whole yet

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_FIX = "do not use this archive; fetch the data set from its publisher."


def extract_tar(path: Path, folder: Path, *, max_bytes: int) -> int:
    """Unpack into the new folder `folder` and return the number of files. AppleDouble files (._NAME) are left out.

    Errors: SafetyError for links, devices, paths that lead out, names that differ in case alone, more than `max_bytes`
    or 100 000 members; ImageError for a damaged archive; ResourceError for the disk. Then nothing is left of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, suffix=UNPACKING, dir=folder.parent) as temporary:
        inside = Path(temporary) / "content"
        inside.mkdir()
        try:
            with tarfile.open(path) as archive:
                num_files = _extract(archive, inside, max_bytes, path)
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise storage_error(error, folder) from error
            fact = f"is no whole tar file ({error})."
            raise ImageError(fact, where=path, fix="remove it, and download it again.") from error
        inside.rename(folder)
    return num_files


def sweep_unpacking(folder: Path) -> None:
    """Remove what killed calls left half unpacked in `folder`; its lock is held, so nobody is at work there."""
    for stray in folder.glob(f"{TEMPORARY_PREFIX}*{UNPACKING}"):
        shutil.rmtree(stray, ignore_errors=True)


def _extract(archive: tarfile.TarFile, folder: Path, max_bytes: int, path: Path) -> int:
    seen, num_bytes, num_files = set[str](), 0, 0
    for number, member in enumerate(archive):
        name = PurePosixPath(member.name)
        num_bytes += member.size
        if number >= MAX_MEMBERS or num_bytes > max_bytes:
            raise SafetyError(f"holds more than {MAX_MEMBERS} files or {max_bytes} bytes.", where=path, fix=_FIX)
        if not (member.isreg() or member.isdir()):
            raise SafetyError(f"holds {member.name!r}, which is no plain file.", where=path, fix=_FIX)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name or "\0" in member.name:
            raise SafetyError(f"holds {member.name!r}, which leads out of its folder.", where=path, fix=_FIX)
        target = require_inside(folder, name.as_posix())
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        if name.as_posix().lower() in seen:
            raise SafetyError(f"holds {member.name!r} twice.", where=path, fix=_FIX)
        seen.add(name.as_posix().lower())
        if name.name.startswith("._"):
            continue
        require_free_space(folder, member.size)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = archive.extractfile(member)
        assert source is not None
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file)
        num_files += 1
    return num_files
