"""Files of tensors, read safely: told apart by content, whole or refused, never run.

The only module that calls torch.load, and only with weights_only=True; a refusal is final.
"""

import json
import re
import struct
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from voxdino.core.errors import SafetyError, WeightsError
from voxdino.core.safe_files import require_file

FACT = "checkpoint."  # before the keys of what lies beside the weights in a .pth file
_WRAPPERS = ("teacher", "model", "state_dict", "model_state_dict", "network_weights")
_MAX_FACT = 10_000  # characters
_AGAIN = "download or copy it again."


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors or .pth file, told apart by content.

    Of a .pth file the metadata are the plain values beside the wrapped weights, as JSON, under FACT + key.
    Errors: WeightsError for web pages, Git LFS pointers, empty, truncated, damaged or foreign files; SafetyError for
    pickles that hold more than tensors, and for the old torch formats, which are pickles throughout.
    """
    size = require_file(path, kind=WeightsError)
    with Path(path).open("rb") as file:
        head = file.read(512)
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        fix = "download it again; the address may need a login or an accepted licence."
        raise WeightsError("is a web page, not weights", where=path, fix=fix)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError("is a Git LFS pointer, not the weights", where=path, fix="run `git lfs pull` in its folder.")
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(Path(path), size)
    if head[8:9] == b"{":
        return _read_safetensors(Path(path), size, int.from_bytes(head[:8], "little"))
    if head[:1] in (b"\x80", b"(", b"c") or head[257:262] == b"ustar":
        raise SafetyError(
            "an old torch or pickle file, which can run code when opened; refused",
            where=path,
            fix="get the weights as .safetensors, or have their author save them with a current torch.save.",
        )
    raise WeightsError("neither a safetensors nor a torch file", where=path, fix=_AGAIN)


def _read_safetensors(path: Path, size: int, header_size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    if 8 + header_size > size:
        raise WeightsError(f"is cut off: {size} bytes, its header alone needs {header_size}", where=path, fix=_AGAIN)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        what = "is cut off or damaged" if "incomplete" in str(error).lower() else "is damaged"
        raise WeightsError(f"{what} ({error})", where=path, fix=_AGAIN) from error


def _read_torch(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
                sum(member.file_size for member in members) > size
            ):
                fact = "holds compressed or overlapping members, which torch never writes; refused"
                raise SafetyError(fact, where=path, fix="get the weights as .safetensors from a source you trust.")
            damaged = archive.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, EOFError) as error:
        raise WeightsError(f"is cut off or damaged ({error})", where=path, fix=_AGAIN) from error
    if damaged is not None:
        raise WeightsError(f"is damaged: {damaged} does not have its checksum", where=path, fix=_AGAIN)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise SafetyError(
                "holds code or objects other than tensors; refused and not tried again in any other way",
                where=path,
                fix="get the weights as .safetensors from a source you trust.",
            ) from error
        raise WeightsError(f"is no torch checkpoint ({str(error)[:120]})", where=path, fix=_AGAIN) from error
    return _only_tensors(content, path, size), _facts(content)


class _NumberKind:
    """Stands in for numpy.dtype while a file is opened: `order` and `code` as in struct."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = _STRUCT_CODES[code], "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">", "|": "<"}[state[1]]


def _number(kind: _NumberKind, data: bytes) -> float | int | bool:
    """Stands in for numpy's maker of scalars: training code likes to save a mean or a score as one."""
    value: float | int | bool = struct.unpack(kind.order + kind.code, data)[0]
    return value


_STRUCT_CODES = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
    "u1": "B", "b1": "?",
}  # fmt: skip
_NUMPY_SCALARS: list[Any] = [
    (_NumberKind, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
]


def _facts(content: Any) -> dict[str, str]:
    """Whatever beside the weights is plain and short."""
    facts = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            continue
        if len(text) <= _MAX_FACT:
            facts[f"{FACT}{key}"] = text
    return facts


def _only_tensors(content: Any, path: Path, size: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the dictionary that wraps them; other entries are bookkeeping."""
    found = content
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    tensors = (
        {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        keys = (
            ", ".join(str(key) for key in list(content)[:5]) if isinstance(content, Mapping) else type(content).__name__
        )
        raise WeightsError(f"holds no tensors (found: {keys})", where=path, fix="give the file of a backbone.")
    if any(value.layout != torch.strided or value.is_quantized for value in tensors.values()):
        raise WeightsError("holds sparse or quantised tensors", where=path, fix="give the file in full precision.")
    if sum(value.numel() * value.element_size() for value in tensors.values()) > 4 * size:
        fact = "declares tensors far larger than the file; refused"
        raise SafetyError(fact, where=path, fix="get the weights as .safetensors from a source you trust.")
    return tensors
