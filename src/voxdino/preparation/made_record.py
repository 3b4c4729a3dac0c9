"""What the records of cases share, whatever was made of them: written last, sealed, and kept while nothing changed."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from voxdino.core.errors import DatasetError, VoxdinoError
from voxdino.core.io import digest_image
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_file, digest_json

M = TypeVar("M", bound="MadeRecord")  # not typing.Self: the checks of the tests see methods without their class


class MadeRecord(Record):
    """The record of a case whose files are whole. Every kind of it has these fields among its own:

    preparation_digest: of everything that shapes the files, the sources apart.
    source_digests:     source file -> SHA-256.
    checksum:           of all the rest; see `is_whole`.
    """

    if TYPE_CHECKING:  # a kind places them itself: the order of fields is that of the file, which others have digested
        preparation_digest: str
        source_digests: dict[str, str]
        checksum: str

    @property
    @abstractmethod
    def file_digests(self) -> dict[str, str]:
        """File beside the record -> SHA-256."""

    def sealed(self: M) -> M:
        """With its checksum."""
        return self.model_copy(update={"checksum": self._content_digest()})

    @property
    def is_whole(self) -> bool:
        """Nothing has changed since it was sealed."""
        return self.checksum == self._content_digest()

    def _content_digest(self) -> str:
        return digest_json(self.model_dump(mode="json", exclude={"checksum"}))


def valid_record(kind: type[M], path: Path, preparation_digest: str, sources: dict[str, str]) -> M | None:
    """The record of a case that need not be made again, if that is so: nothing missing, changed or half written."""
    if not path.exists():
        return None
    try:
        record = kind.read(path)
        is_valid = (
            record.is_whole
            and record.preparation_digest == preparation_digest
            and record.source_digests == sources
            and all(digest_file(path.with_name(name)) == digest for name, digest in record.file_digests.items())
        )
    except (VoxdinoError, OSError):
        return None
    return record if is_valid else None


def source_digest(path: Path) -> str:
    """SHA-256 of a source image (`digest_image`). Errors: DatasetError where it cannot be read."""
    try:
        return digest_image(path)
    except OSError as error:
        fact = f"cannot be read ({error.strerror})."
        raise DatasetError(fact, where=path, fix="restore the file, or remove the case.") from error
