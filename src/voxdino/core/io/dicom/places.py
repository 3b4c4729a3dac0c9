"""Where DICOM bytes come from: files of a folder, members of a zip archive; nothing that a DICOMDIR points at."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydicom.filereader import dcmread

from voxdino.core.errors import ImageError, SafetyError
from voxdino.core.safe_files import format_bytes, require_file

DICOMDIR = "DICOMDIR"
MAGIC, MAGIC_AT = b"DICM", 128

_MOST_MEMBERS = 100_000
_HARMLESS_BYTES = 256 << 20  # what an archive may unpack to whatever its ratio
_MOST_RATIO = 100  # lossless compression of real images brings 2 to 10
_LYING_BYTES = 1 << 30  # an element that claims so much more than the file has is no truncation
_LOCAL_HEADER, _NAME_AT = 30, 26
_FIRST_LOOKED_AT = 8  # files by which a folder is known for DICOM
_AGAIN = "export or copy it again."


class BoundedFile:
    """A file that is never asked for more than it holds: lengths in a header are not believed.

    Errors: SafetyError where an element claims a size far beyond the file's.
    """

    def __init__(self, file: BinaryIO | io.BytesIO, size: int, where: Path) -> None:
        self._file, self._size, self._where = file, size, where

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        if size > left + _LYING_BYTES:
            fact = f"declares an element of {format_bytes(size)} in a file of {format_bytes(self._size)}."
            raise SafetyError(fact, where=self._where, fix=_AGAIN)
        return self._file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "BoundedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Member:
    """A file inside a zip archive: where it begins, its sizes, CRC-32, whether it is deflated."""

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    is_deflated: bool


@dataclass(frozen=True)
class Place:
    """One file on the disk, or one member of an archive."""

    path: Path
    member: Member | None = None

    @property
    def where(self) -> Path:
        """What a message calls it."""
        return self.path if self.member is None else self.path / self.member.name

    def open(self) -> BoundedFile:
        """Its bytes. Errors: OSError; ImageError for damaged members."""
        if self.member is not None:
            return BoundedFile(io.BytesIO(_unpack(self.path, self.member)), self.member.size, self.where)
        file = self.path.open("rb")
        return BoundedFile(file, os.fstat(file.fileno()).st_size, self.path)

    def head(self) -> bytes:
        """Its first 132 bytes."""
        if self.member is not None:
            return _unpack(self.path, self.member, only=MAGIC_AT + 4)
        with self.path.open("rb") as file:
            return file.read(MAGIC_AT + 4)


def find_places(path: Path, *, is_deep: bool = True) -> list[Place]:
    """All files below a folder (or directly in it, unless `is_deep`), all members of a zip archive, or the file itself.

    Hidden ones are left out, links to folders are not followed.
    Errors: SafetyError for archives that lead outside, and for a DICOMDIR.
    """
    if path.is_dir():
        return [Place(file) for file in _files_below(path, is_deep=is_deep)]
    require_file(path, kind=ImageError)
    if is_zip(path):
        return [Place(path, member) for member in _members(path)]
    if path.name.upper() == DICOMDIR:
        fact = "is a DICOMDIR, an index of other files; it is never followed."
        raise SafetyError(fact, where=path, fix="give the folder that holds the images.")
    return [Place(path)]


def open_index(place: Place) -> list[list[str]]:
    """The names of the files that a DICOMDIR points at, part by part."""
    with place.open() as file:
        index = dcmread(file, force=True)
    named = [item.get("ReferencedFileID") for item in index.get("DirectoryRecordSequence") or ()]
    return [[str(part) for part in ([name] if isinstance(name, str) else name)] for name in named if name]


def is_zip(path: Path) -> bool:
    """Whether the file begins as a zip archive does."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def is_dicom(head: bytes) -> bool:
    """Whether the first 132 bytes are those of a DICOM file, also of one without preamble (as old archives wrote)."""
    if head[MAGIC_AT : MAGIC_AT + 4] == MAGIC:
        return True
    return (head[:2] in (b"\x08\0", b"\x02\0") and head[3:4] == b"\0") or head[:3] == b"\0\x08\0"


def is_scan(path: Path) -> bool:
    """Whether a folder, an archive or a file holds DICOM: by the first bytes of some of its files."""
    if path.is_file() and not (path.stat().st_size and is_zip(path)):
        return _begins_as_dicom(path) or path.name.upper() == DICOMDIR  # which reading will refuse
    if path.is_dir():
        names = sorted(entry.path for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith("."))
        step = max(1, len(names) // _FIRST_LOOKED_AT)
        return any(_begins_as_dicom(Path(name)) for name in names[::step])
    if not path.is_file():
        return False
    try:
        members = _members(path)[:_FIRST_LOOKED_AT]
        return any(is_dicom(Place(path, member).head()) for member in members)
    except (ImageError, SafetyError):
        return path.suffix.lower() == ".zip"  # reading it will say what is wrong


def _begins_as_dicom(path: Path) -> bool:
    try:
        return is_dicom(Place(path).head()) and path.name.upper() != DICOMDIR
    except OSError:
        return False


def _files_below(root: Path, *, is_deep: bool) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if is_deep and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path


def _members(path: Path) -> list[Member]:
    """The files in an archive, none of which leaves it, is an archive itself, or unpacks to far more than it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ImageError("is a damaged zip archive.", where=path, fix=_AGAIN) from error
    packed = path.stat().st_size
    total = sum(info.file_size for info in infos)
    if len(infos) > _MOST_MEMBERS or total > max(_HARMLESS_BYTES, _MOST_RATIO * packed):
        fact = f"{len(infos)} files of {format_bytes(total)} in an archive of {format_bytes(packed)}."
        raise SafetyError(fact, where=path, fix="unpack it yourself if it is what you expect, and give the folder.")
    members = []
    for info in infos:
        name = PurePosixPath(info.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in name.parts[0]:
            raise SafetyError("a file in this archive leads outside of it.", where=path, fix="pack the files again.")
        if name.suffix.lower() == ".zip":
            raise SafetyError("holds another archive.", where=path, fix="unpack it, and give the folder.")
        if any(part.startswith((".", "__MACOSX")) for part in name.parts):
            continue
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fact = "is encrypted, or packed with a method other than deflate."
            raise ImageError(fact, where=path, fix="unpack it, and give the folder.")
        is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
        members.append(
            Member(info.filename, info.header_offset, info.compress_size, info.file_size, info.CRC, is_deflated)
        )
    return sorted(members, key=lambda member: member.name)


def _unpack(path: Path, member: Member, only: int | None = None) -> bytes:
    """A member's bytes, never more than declared; or `only` its first ones, unchecked.

    Errors: ImageError where they are not what was packed; SafetyError for an archive in the archive.
    """
    wanted = member.size if only is None else min(only, member.size)
    with path.open("rb") as file:
        file.seek(member.offset)
        header = file.read(_LOCAL_HEADER)
        lengths = [int.from_bytes(header[at : at + 2], "little") for at in (_NAME_AT, _NAME_AT + 2)]
        file.seek(member.offset + _LOCAL_HEADER + sum(lengths))
        packed = file.read(min(member.packed, 4 * wanted + _LOCAL_HEADER if only else os.fstat(file.fileno()).st_size))
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, wanted or 1) if member.is_deflated else packed
    except zlib.error:
        data = b""
    data = data[:wanted]
    if len(data) != wanted or (only is None and zlib.crc32(data) != member.crc):
        fact = "is damaged: a file in this archive fails its checksum."
        raise ImageError(fact, where=path, fix="copy or download it again.")
    if data[:4] == b"PK\x03\x04":
        raise SafetyError("holds another archive.", where=path, fix="unpack it, and give the folder.")
    return data
