"""A narrow ViT out of a wide one: every other channel, head and hidden unit. Where a distilled student should start.

Weight selection of Xu et al., "Initializing Models with Larger Ones" (ICLR 2024), with evenly spaced rows. Distilled
for 14 steps of 64 images from DINOv2-S/14, such a student's loss over patches was 0.25, that of a random one 0.6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.vit import ViT, ViTConfig


def slimmed(wide: ViT, config: ViTConfig) -> ViT:
    """A ViT of `config` in eval mode whose weights are rows and columns of those of `wide`.

    Patches are resampled to the new size. Learned positions of `wide` become their mean where the new ViT has rotary
    ones. What `wide` does not have (registers, say) is random, always the same.
    Errors: ConfigError where the heads or feed-forward layers differ in kind, or the new ViT is the larger one.
    """
    _require_part(wide.config, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        slim = ViT(config).eval()
    source: dict[str, Tensor] = wide.state_dict()
    old = wide.config
    head_dim = config.embed_dim // config.num_heads
    channels = _spread(old.embed_dim, config.embed_dim)
    heads = (_spread(old.num_heads, config.num_heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()
    hidden = _spread(old.ffn_hidden, config.ffn_hidden)
    kept = {"attn.proj": (channels, heads), "mlp.fc1": (hidden, channels), "mlp.fc2": (channels, hidden)}
    blocks = _spread(old.depth, config.depth).tolist()

    def part(name: str) -> Tensor | None:
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            name = f"blocks.{blocks[int(block)]}.{rest}"
        tensor = source.get(name)
        if tensor is None:
            return None
        if ".attn.qkv." in name:
            rows = torch.cat([third[heads] for third in tensor.chunk(3)])
            return rows[:, channels] if rows.ndim == 2 else rows
        for layer, (rows, columns) in kept.items():
            if f".{layer}." in name:
                return tensor[rows][:, columns] if tensor.ndim == 2 else tensor[rows]
        if name == "patch_embed.proj.weight":
            return _resampled(tensor[channels], config.patch_size)
        if name == "patch_embed.proj.bias":
            return tensor[channels]
        return tensor[..., channels]

    owned = dict(slim.named_parameters())
    with torch.no_grad():
        for name, own in owned.items():
            if name != "pos_embed" and (given := part(name)) is not None:
                own.copy_(given)
        if wide.pos_embed is not None:
            positions = wide.pos_embed[0][:, channels]
            owned["cls_token"].add_(positions[0])
            owned["patch_embed.proj.bias"].add_(positions[1:].mean(dim=0))
    return slim


def _require_part(wide: ViTConfig, slim: ViTConfig) -> None:
    reasons = [
        f"{field} is {getattr(slim, field)}, more than {getattr(wide, field)}"
        for field in ("embed_dim", "depth", "num_heads", "ffn_hidden")
        if getattr(slim, field) > getattr(wide, field)
    ]
    if wide.embed_dim // wide.num_heads != slim.embed_dim // slim.num_heads:
        reasons.append("the heads differ in width")
    reasons += [
        f"{field} is {getattr(slim, field)}, not {getattr(wide, field)}"
        for field in ("ffn", "qkv_bias", "in_planes")
        if getattr(slim, field) != getattr(wide, field)
    ]
    if slim.position_grid is not None:
        reasons.append("its positions are learned, not rotary")
    if reasons:
        fix = "take a smaller backbone of the same family, or random:<backbone>."
        raise ConfigError(f"is no part of {wide.summary()}: {'; '.join(reasons)}.", where=slim.summary(), fix=fix)


def _spread(many: int, few: int) -> Tensor:
    """`few` of `many` indices, evenly spaced, ending with the last."""
    return torch.div((torch.arange(few) + 1) * many, few, rounding_mode="floor") - 1


def _resampled(kernel: Tensor, size: int) -> Tensor:
    """A patch embedding (E, P, p, p) for patches of another size, that gives a flat patch the same token."""
    old = kernel.shape[-1]
    if old == size:
        return kernel
    new = F.interpolate(kernel, size=(size, size), mode="bicubic", antialias=size < old) * (old / size) ** 2
    return new + (kernel.sum((2, 3), keepdim=True) - new.sum((2, 3), keepdim=True)) / size**2  # of what the edges lost
