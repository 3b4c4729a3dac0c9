"""What the layouts share: reading dataset.json strictly, and finding the files that a description names."""

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from voxdino.core.errors import DatasetError, ResourceError
from voxdino.core.io import image_suffix
from voxdino.core.io.options import ReadOptions
from voxdino.core.records import nearest
from voxdino.core.safe_files import read_json, require_inside

_MOST_NAMED = 20  # files named in one message


def read_description(path: Path, *, required: Iterable[str], optional: Iterable[str]) -> dict[str, Any]:
    """The object in dataset.json. Errors: ConfigError for bad JSON; DatasetError for missing and misspelt keys."""
    value = read_json(path)
    if not isinstance(value, dict):
        fact = f"holds a {type(value).__name__}, not an object {{...}}."
        raise DatasetError(fact, where=path, fix="write it as nnU-Net or MSD data sets do.")
    required = tuple(required)
    known = (*required, *optional)
    unknown = [key for key in value if key not in known]
    for key in required:
        if key not in value:
            hint = nearest(key, unknown)
            fix = f'rename that key to "{key}".' if hint else f'add the key "{key}".'
            raise DatasetError(f"the key '{key}' is missing.{hint}", where=path, fix=fix)
    for key in unknown:  # free text such as "citation" is common; a near miss of a known key is a typing error
        meant = get_close_matches(key, [name for name in known if name not in value], n=1, cutoff=0.8)
        if meant:
            fact = f"unknown key '{key}'. Did you mean '{meant[0]}'?"
            raise DatasetError(fact, where=path, fix="rename the key, or remove it.")
    return value


def require_type(value: Any, kind: type | tuple[type, ...], key: str, path: Path, example: str) -> Any:
    """`value`, or a DatasetError that says what the key should look like."""
    if not isinstance(value, kind) or isinstance(value, bool):
        fact = f"'{key}' is {str(value)[:60]!r}, not like {example}."
        raise DatasetError(fact, where=path, fix=f'write "{key}": {example}.')
    return value


def numbered_names(value: Any, key: str, path: Path) -> tuple[str, ...]:
    """The names of {"0": "T1", "1": "T2"} in the order of their numbers, which must run from 0 without gaps."""
    example = '{"0": "CT"}'
    require_type(value, dict, key, path, example)
    numbers = {name: int(name) for name in value if name.isascii() and name.isdigit()}
    if not value or len(numbers) != len(value) or sorted(numbers.values()) != list(range(len(value))):
        fact = f"'{key}' has the keys {', '.join(value) or 'none'}; they must be numbers from 0 on."
        raise DatasetError(fact, where=path, fix=f'write "{key}": {example}.')
    ordered = sorted(value, key=lambda name: numbers[name])
    return tuple(str(require_type(value[name], str, f"{key}.{name}", path, '"CT"')) for name in ordered)


class NamedFiles:
    """Files that a description names by text: they must lie inside the root and be there.

    Each folder is listed and resolved once, so that 100 000 names take a moment. Missing files are remembered, and
    told all at once by `require_all`.
    """

    def __init__(self, root: Path, options: ReadOptions, described_in: Path) -> None:
        self._root = root
        self._options = options
        self._described_in = described_in
        self._folders: dict[Path, Mapping[str, bool]] = {}  # folder -> file name -> is it a link?
        self._missing: list[str] = []

    def find(self, text: str) -> Path:
        """The path of a file named `text`. Errors: SafetyError when it leaves the root."""
        if "://" in text:
            require_inside(self._root, text)
        path = self._root / text
        names = self._list(path.parent, text)
        if path.name not in names:
            self._missing.append(text)
        elif names[path.name]:
            require_inside(self._root, text, self._options.allow_external)
        return path

    def _list(self, folder: Path, text: str) -> Mapping[str, bool]:
        if folder not in self._folders:
            require_inside(self._root, folder, self._options.allow_external)
            try:
                with os.scandir(folder) as entries:
                    self._folders[folder] = {entry.name: entry.is_symlink() for entry in entries}
            except (OSError, ValueError):  # no such folder, a name too long, a NUL byte
                self._folders[folder] = {}
        return self._folders[folder]

    def require_all(self) -> None:
        """Errors: DatasetError listing every named file that is missing."""
        if self._missing:
            told = ", ".join(self._missing[:_MOST_NAMED])
            more = f" and {len(self._missing) - _MOST_NAMED} more" if len(self._missing) > _MOST_NAMED else ""
            fact = f"names {len(self._missing)} files that do not exist: {told}{more}."
            raise DatasetError(fact, where=self._described_in, fix="add the files, or correct the paths.")


def stem_of(path: Path) -> str:
    """The file's name without the suffix that says its format."""
    return path.name[: len(path.name) - len(image_suffix(path))]


def list_folder(folder: Path) -> list[str]:
    """Names of the visible entries of a folder, sorted; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        fix = "check the permissions of the folder."
        raise ResourceError(f"cannot be listed ({error.strerror}).", where=folder, fix=fix) from error


def tell_names(names: Iterable[str]) -> str:
    """ "a, b, c and 12 more": how messages list cases."""
    every = list(names)
    more = f" and {len(every) - _MOST_NAMED} more" if len(every) > _MOST_NAMED else ""
    return ", ".join(every[:_MOST_NAMED]) + more
