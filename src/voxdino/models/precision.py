"""The device to compute on, and where bfloat16 arithmetic pays."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from voxdino.core.errors import ResourceError
from voxdino.core.memory import total_memory


def uses_bf16(device: torch.device, amp: Literal["auto", "bf16", "off"]) -> bool:
    """Whether to compute in bfloat16. "auto": only where the hardware multiplies it faster than float32.

    A CPU without avx512_bf16 or amx emulates bfloat16 and gets slower.
    """
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """bfloat16 for matrix products and convolutions inside the block; float32 for the rest."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def resolve_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "mps"; "auto" takes a GPU where there is one.

    Errors: ResourceError where the named one is absent.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    if not has.get(name, False):
        raise ResourceError(
            f"there is no {name} device here that this PyTorch can use", where="--device", fix="use --device cpu."
        )
    return torch.device(name)


def device_memory(device: torch.device) -> int:
    """Bytes it has, free or not; of devices that do not tell, those of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return total_memory()


def channels_last(model: nn.Module) -> None:
    """Put the weights of all convolutions into the layout that is fastest on CPUs with bfloat16 and on GPUs."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim in formats:
            tensor.data = tensor.data.contiguous(memory_format=formats[tensor.ndim])
