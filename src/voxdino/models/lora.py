"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a backbone's blocks; our own, no peft."""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.blocks import AdaptableLinear
from voxdino.models.backbones.vit import ViT

LORA_TARGETS = ("qkv", "proj", "fc1", "fc2", "w1", "w2", "w3")


class LoraAdapter(nn.Module):
    """scale * up(down(dropout(x))) with scale = alpha / rank; `up` starts at zero, so nothing changes at first."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        out: Tensor = self.up(self.down(self.dropout(x)))
        return self.scale * out


def add_lora(
    vit: ViT, *, rank: int = 16, alpha: float = 16.0, dropout: float = 0.1, targets: Collection[str] = LORA_TARGETS
) -> int:
    """Freeze the backbone and put an adapter on every target layer of every block; returns their number.

    The defaults are DINO-Med3D's (dossier 1.4), without the patch embedding. Parameters are named
    `blocks.N.attn.qkv.adapter.{down,up}.weight`; the names of the backbone's own stay.
    """
    if rank < 1 or not 0 <= dropout < 1 or not set(targets) <= set(LORA_TARGETS):
        raise ConfigError(
            f"LoRA with rank {rank}, dropout {dropout} and targets {', '.join(sorted(targets))} cannot be built",
            fix=f"rank is at least 1, dropout in [0, 1), targets from {', '.join(LORA_TARGETS)}.",
        )
    vit.requires_grad_(False)
    layers = [
        module
        for name, module in vit.blocks.named_modules()
        if isinstance(module, AdaptableLinear) and name.rpartition(".")[2] in targets
    ]
    for layer in layers:
        adapter = LoraAdapter(layer.in_features, layer.out_features, rank=rank, alpha=alpha, dropout=dropout)
        layer.adapter = adapter.to(layer.weight.device).train(layer.training)
    return len(layers)


@torch.no_grad()
def merge_lora(vit: ViT) -> int:
    """Add every adapter to the weights under it and remove it: same output, plain backbone; returns their number."""
    layers = [m for m in vit.modules() if isinstance(m, AdaptableLinear) and isinstance(m.adapter, LoraAdapter)]
    for layer in layers:
        assert isinstance(layer.adapter, LoraAdapter)
        layer.weight += layer.adapter.scale * layer.adapter.up.weight @ layer.adapter.down.weight
        layer.adapter = None
    return len(layers)


def merged_state(state: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """The state of an adapted backbone as that of a plain one: `merge_lora` on tensors. alpha: of all its adapters."""
    merged = {key: value for key, value in state.items() if ".adapter." not in key}
    for key, down in state.items():
        stem, found, _ = key.partition(".adapter.down.weight")
        if found:
            change = state[f"{stem}.adapter.up.weight"] @ down * (alpha / len(down))
            merged[f"{stem}.weight"] = merged[f"{stem}.weight"] + change
    return merged
