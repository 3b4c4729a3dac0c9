"""The only way a final file comes to be: whole or not at all. Also digests, free space, paths that stay in.

Write beside the target, fsync, rename, fsync the folder. A kill at any moment leaves the old file or the new one, and
at most a stray `.tmp-*` that `sweep_temporary` removes.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from voxdino.core.errors import CheckpointError, ConfigError, InputError, ResourceError, SafetyError, VoxdinoError
from voxdino.core.strict_json import parse_json

TEMPORARY_PREFIX = ".tmp-"
MANIFEST_NAME = "manifest.json"

_STRAY_AFTER_S = 24 * 3600  # another machine's temporary file of this age is nobody's any more
_NEARLY_FULL = 64 * 1024  # bytes free below which a failed write is put down to the disk
_writing: set[str] = set()  # names of the temporary files this process has open


@contextmanager
def write_atomic(path: str | PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name `path` only when the block ends well.

    Parent folders are made. The temporary name keeps the suffixes (".nii.gz"), its mode follows the umask.
    Errors: ResourceError when the disk is full, read-only or failing; the old file is then untouched.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, target) from error
    suffix = "".join(target.suffixes[-2:])
    name = f"{TEMPORARY_PREFIX}{_host_tag()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    temporary = target.with_name(name)
    _writing.add(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except VoxdinoError:
        raise
    except OSError as error:
        raise storage_error(error, target) from error
    except Exception as error:  # C++ writers report a full disk as anything
        if _free_bytes(target.parent) < _NEARLY_FULL:
            raise storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), target) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _writing.discard(name)


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write `data` atomically."""
    with write_atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write `text` atomically as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | PathLike[str], value: Any) -> None:
    """Write `value` atomically as JSON a person can read. NaN and infinity are not JSON: write None."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | PathLike[str]) -> Any:
    """The value of a JSON file. Errors: ConfigError with line and column for anything that strict JSON is not."""
    require_file(path, kind=ConfigError)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ResourceError(f"cannot be read ({error.strerror}).", where=path, fix="check the permissions.") from error
    return parse_json(data, where=path)


def require_file(path: str | PathLike[str], *, kind: type[InputError] = InputError) -> int:
    """The size in bytes of a regular, non-empty file; everything else is an error of `kind` that says what it is.

    Never opens the path, so that FIFOs and devices cannot hang us.
    """
    file = Path(path)
    try:
        status = file.stat()
    except FileNotFoundError:
        if file.is_symlink():
            fix = "repair the link, or remove it."
            raise kind("is a symbolic link to a file that does not exist.", where=path, fix=fix) from None
        raise kind("no such file.", where=path, fix="check the path.") from None
    except (OSError, RuntimeError, ValueError) as error:  # loops, names too long, NUL bytes
        reason = getattr(error, "strerror", None) or str(error)
        raise kind(f"cannot be opened ({reason}).", where=path, fix="check the path.") from error
    mode = status.st_mode
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            raise kind(f"is {name}, not a file.", where=path, fix="give the path of a file.")
    if status.st_size == 0:
        raise kind("is an empty file (0 bytes).", where=path, fix="copy or export it again.")
    return status.st_size


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str | PathLike[str]) -> str:
    """SHA-256 of a file's content in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_path(path: str | PathLike[str]) -> str:
    """SHA-256 of a file's content; of a folder's, the digest of the names and digests of all files below it."""
    root = Path(path)
    if not root.is_dir():
        return digest_file(root)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    return digest_json([[file.relative_to(root).as_posix(), digest_file(file)] for file in files])


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: key order and layout do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return digest_bytes(text.encode("utf-8"))


def sweep_temporary(folder: str | PathLike[str]) -> int:
    """Remove the temporary files that killed runs left in `folder` (not below it); returns how many.

    A file whose writer still lives is left alone, and so is one of another machine until it is a day old.
    """
    num_removed = 0
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_file() and not path.is_symlink() and _is_stray(path):
            with suppress(OSError):
                path.unlink()
                num_removed += 1
    return num_removed


def _is_stray(path: Path) -> bool:
    host, _, rest = path.name.removeprefix(TEMPORARY_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if host == _host_tag() and pid.isascii() and pid.isdigit():
        return path.name not in _writing if int(pid) == os.getpid() else not _is_alive(int(pid))
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _STRAY_AFTER_S
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _host_tag() -> str:
    return digest_bytes(socket.gethostname().encode())[:6]


def require_free_space(folder: str | PathLike[str], num_bytes: int) -> None:
    """ResourceError when the disk of `folder` (which need not exist yet) has less than `num_bytes` free."""
    free = _free_bytes(Path(folder))
    if free < num_bytes:
        fact = f"{format_bytes(num_bytes)} are needed, {format_bytes(free)} are free on this disk."
        raise ResourceError(fact, where=folder, fix="free space, or choose a folder on another disk.")


def _free_bytes(folder: Path) -> int:
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return 0


def require_inside(root: str | PathLike[str], path: str | PathLike[str], allow_external: bool = False) -> Path:
    """The resolved place of `path` (relative to `root`), which must lie in `root` after all links are followed.

    Errors: SafetyError when it escapes or is a URL; InputError for links in a circle.
    """
    text = os.fspath(path)
    if "://" in text:
        raise SafetyError("is a URL; files are read from this machine only.", where=text, fix="download it first.")
    try:
        base = Path(root).resolve()
        resolved = (base / text).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"the path cannot be followed ({error}).", where=text, fix="repair the links.") from error
    if not allow_external and not resolved.is_relative_to(base):
        fact = f"leads outside its folder {root}."
        raise SafetyError(fact, where=text, fix="move the file inside, or allow it with --allow-external.")
    return resolved


@dataclass(frozen=True)
class Manifest:
    """What belongs to a folder and its digests; written last, so that its presence means "complete".

    files: name -> (SHA-256 in hex, size in bytes).
    """

    files: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, folder: str | PathLike[str], names: Iterable[str]) -> "Manifest":
        """Digest the named files of `folder`."""
        root = Path(folder)
        return cls({name: (digest_file(root / name), (root / name).stat().st_size) for name in sorted(names)})

    def write(self, folder: str | PathLike[str]) -> None:
        files = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in self.files.items()}
        write_json(Path(folder) / MANIFEST_NAME, {"files": files})

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> "Manifest":
        """Errors: CheckpointError when there is none: the folder was never completed."""
        path = Path(folder) / MANIFEST_NAME
        if not path.exists():
            raise CheckpointError(
                f"has no {MANIFEST_NAME}: it was never completed.", where=folder, fix="make it again."
            )
        value = read_json(path)
        try:
            files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in value["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("is not a manifest of ours.", where=path, fix="make the folder again.") from error
        return cls(files)

    def verify(self, folder: str | PathLike[str], names: Iterable[str] | None = None) -> None:
        """CheckpointError naming the first file (of `names`, default: all) that is missing, short or changed."""
        for name in self.files if names is None else names:
            self.require_sizes(folder, [name])
            if digest_file(require_inside(folder, name)) != self.files[name][0]:
                fact = "is damaged: its content is not what was written (checksum differs)."
                fix = "restore it from a copy, or make it again."
                raise CheckpointError(fact, where=Path(folder) / name, fix=fix)

    def require_sizes(self, folder: str | PathLike[str], names: Iterable[str]) -> None:
        """As `verify`, but files are not read: one that was changed in place is not found out."""
        for name in names:
            if name not in self.files:
                raise CheckpointError(
                    f"is not listed in {MANIFEST_NAME}.", where=Path(folder) / name, fix="make it again."
                )
            size = self.files[name][1]
            path = require_inside(folder, name)
            found = require_file(path, kind=CheckpointError) if size else path.stat().st_size
            if found != size:
                fact = f"is damaged: {found} bytes, {size} were written."
                raise CheckpointError(fact, where=path, fix="restore it from a copy, or make it again.")


def format_bytes(num_bytes: int) -> str:
    """ "3.2 GiB": how messages print sizes."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def storage_error(error: OSError, path: Path) -> ResourceError:
    """What a failed write means to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(_free_bytes(path.parent))
        return ResourceError(f"the disk is full ({free} free).", where=path, fix="free space and run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"cannot be written ({error.strerror}).", where=path, fix="choose a folder you may write.")
    reason = error.strerror or str(error)
    return ResourceError(f"could not be written ({reason}).", where=path, fix="check the disk and the path.")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
