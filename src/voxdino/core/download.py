"""Files from the network: resumed where they broke off, bounded, checked, under their final name only when whole."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from voxdino.core.errors import ResourceError, SafetyError, UsageError
from voxdino.core.safe_files import format_bytes, require_free_space, write_atomic

TIMEOUT_S = 60.0
BLOCK = 1 << 20

_AGAIN = "run the same command again: it goes on from there."


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Never from https to anything else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        require_safe(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def require_safe(url: str) -> None:
    """https, or http to this machine. Errors: SafetyError."""
    parts = urlsplit(url)
    is_here = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_here):
        raise SafetyError(f"is {parts.scheme}, which anybody on the way can change.", where=url, fix="use https.")


def download(
    url: str,
    path: Path,
    *,
    digest: str | None,
    max_bytes: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Fetch `url` to `path` and return its digest, "md5:..." or "sha256:...". What is there already is kept if right.

    What came before a break stays beside it as PATH.part and is gone on from (HTTP ranges).
    digest:    that it must have, with its kind; None: not known beforehand, SHA-256 is returned.
    max_bytes: more is refused, announced or not.
    on_progress(done, total): bytes; total 0 where the server does not say.
    Errors: SafetyError for another digest, too many bytes, a redirect away from https (the part is removed);
    ResourceError for the network and the disk (the part is kept).
    """
    require_safe(url)
    kind = digest.partition(":")[0] if digest else "sha256"
    if path.is_file():
        if digest is not None and digest_of(path, kind) != digest:
            fix = "move it away, and run the command again."
            raise UsageError("is there already, and is another file.", where=path, fix=fix)
        return digest_of(path, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, part, max_bytes, on_progress)
        found = digest_of(part, kind)
        if digest is not None and found != digest:
            raise SafetyError(f"is not the file that was published: {found}, not {digest}.", where=url, fix=_AGAIN)
    except SafetyError:
        part.unlink(missing_ok=True)
        raise
    with write_atomic(path) as temporary:
        part.replace(temporary)
    return found


def digest_of(path: Path, kind: str) -> str:
    """ "md5:..." of a file."""
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def _fetch(url: str, part: Path, max_bytes: int, on_progress: Callable[[int, int], None] | None) -> None:
    """All of the body in `part`, going on where it ends."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "voxdino"})  # noqa: S310 (https, see require_safe)
    if have:
        request.add_header("Range", f"bytes={have}-")
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            start, total = _extent(response, have, url)
            require_few(total, max_bytes, url)
            require_free_space(part.parent, max(0, total - start))
            with part.open("r+b" if start else "wb") as file:
                file.truncate(start)
                file.seek(start)
                done = _copy(response, file, start, total, max_bytes, url, on_progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left: it is complete, or no part of this file
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink()
            return _fetch(url, part, max_bytes, on_progress)
        raise ResourceError(
            f"the server says {error.code} {error.reason}.", where=url, fix="try again later."
        ) from None
    except (OSError, http.client.HTTPException) as error:  # of urllib too: its errors are OSErrors
        reason = getattr(error, "reason", None) or error
        raise ResourceError(f"the download broke off ({reason}).", where=url, fix=_AGAIN) from error
    if total and done != total:
        raise ResourceError(f"the download broke off after {done} of {total} bytes.", where=url, fix=_AGAIN)


def _extent(response: Any, have: int, url: str) -> tuple[int, int]:
    """Where the body starts in the file, and how long the file is (0: unknown)."""
    if response.status != 206:
        length = response.headers.get("Content-Length") or "0"
        if re.fullmatch(r"[0-9]{1,18}", length) is None:
            fact = f"the server says that the file has {length[:40]!r} bytes."
            raise ResourceError(fact, where=url, fix="try again later.")
        return 0, int(length)
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != have:
        raise ResourceError("the server sends another part than asked for.", where=url, fix="remove the .part file.")
    return have, int(match[3])


def require_few(num_bytes: int, max_bytes: int, where: str) -> None:
    """Errors: SafetyError."""
    if num_bytes > max_bytes:
        fact = f"has {format_bytes(num_bytes)}, more than the {format_bytes(max_bytes)} it should have."
        raise SafetyError(fact, where=where, fix="see whether the data set has changed.")


def _copy(
    response: Any,
    file: IO[bytes],
    start: int,
    total: int,
    max_bytes: int,
    url: str,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    done = start
    while block := response.read(BLOCK):
        done += len(block)
        require_few(done, max_bytes, url)
        file.write(block)
        if on_progress is not None:
            on_progress(done, total)
    return done
