"""Tensors that are computed once: a file and its digest; what is damaged or cut off is computed again."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from voxdino.core.errors import InputError
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_file, write_atomic
from voxdino.models.tensor_files import read_tensors


class Seal(Record):
    """NAME.json beside NAME.safetensors, written last."""

    sha256: str


def kept(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, made where it is not there or not as it was written. Floats are kept in 16 bits.

    What is made now comes back as it will be read later, to the same bits. Errors: those of `make`; ResourceError.
    """
    if is_kept(path):
        return read_tensors(path)[0]
    tensors = {name: _compact(tensor) for name, tensor in make().items()}
    with write_atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    Seal(sha256=digest_file(path)).write(path.with_suffix(".json"))
    return tensors


def is_kept(path: Path) -> bool:
    """Whether the file is there, whole and as it was written."""
    if not path.is_file():
        return False
    try:
        return Seal.read(path.with_suffix(".json")).sha256 == digest_file(path)
    except InputError:  # no seal, or a damaged one
        return False


def _compact(tensor: Tensor) -> Tensor:
    kept = tensor.detach().cpu()
    if kept.is_floating_point():
        limit = torch.finfo(torch.float16).max
        kept = kept.float().clamp(-limit, limit).half()
    return kept.contiguous()
