"""A model as it computes fastest in bfloat16: weights rounded once, and for a CPU in the order that oneDNN wants."""

import copy
from functools import cache
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.backbones.blocks import AdaptableLinear, Mlp
from voxdino.models.segmenter import Segmenter

_ROUNDED = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # by autocast, at every call


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on the CPU, with GELU in the same pass where that follows.

    The values are those of the layer, 5 to 20 % sooner: its weight lies in oneDNN's own order, from which it cannot be
    read back. So it is shared by copies, and is not among the parameters.
    """

    def __init__(self, linear: AdaptableLinear, then: Literal["none", "gelu"] = "none") -> None:
        super().__init__()
        mask = linear.bias_mask
        bias = linear.bias if linear.bias is None or mask is None else linear.bias * mask
        self._bias = None if bias is None else bias.detach().bfloat16()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16())
        self._then = then

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        return self

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        packed = torch.ops.mkldnn._linear_pointwise  # what torch's compiler makes of a linear layer
        out: Tensor = packed(x.bfloat16(), self._weight, self._bias, self._then, [], "none")  # GELU by erf
        return out


def rounded_weights(segmenter: Segmenter, device: torch.device) -> Segmenter:
    """The same model with the weights in bfloat16 that autocast would round at every call; all others are shared."""
    instead: dict[int, Any] = _packed(segmenter) if device.type == "cpu" and can_pack() else {}
    instead |= {
        id(weight): nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        for module in segmenter.modules()
        if isinstance(module, _ROUNDED) and id(module) not in instead
        for weight in module.parameters(recurse=False)
    }
    if not instead:
        return segmenter
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*segmenter.parameters(), *segmenter.buffers())}
    return copy.deepcopy(segmenter, shared | instead)


def _packed(segmenter: Segmenter) -> dict[int, nn.Module]:
    """What stands in for the linear layers of our ViT's blocks, and for two with GELU between.

    Others stay: code that is not ours (timm's) may read a layer's weight.
    """
    found: dict[int, nn.Module] = {}
    for one in segmenter.modules():
        if type(one) is Mlp and _is_plain(one.fc1) and _is_plain(one.fc2):
            found[id(one)] = nn.Sequential(PackedLinear(one.fc1, "gelu"), PackedLinear(one.fc2))
            found |= {id(one.fc1): one.fc1, id(one.fc2): one.fc2}  # which nothing else reaches
        elif _is_plain(one) and id(one) not in found:
            found[id(one)] = PackedLinear(one)
    return found


def _is_plain(module: nn.Module) -> TypeGuard[AdaptableLinear]:
    return type(module) is AdaptableLinear and module.adapter is None


@cache
def can_pack() -> bool:
    """Whether this torch has these operations, which only its compiler uses, and this processor what they need."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode():
        layer, x = AdaptableLinear(16, 16), torch.randn(2, 16)
        try:
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            seen = PackedLinear(layer, "gelu")(x).float()
        except (AttributeError, RuntimeError, TypeError):
            return False
        return torch.allclose(seen, F.gelu(layer(x)), rtol=2**-6, atol=2**-6)
