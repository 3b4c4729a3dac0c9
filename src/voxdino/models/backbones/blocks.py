"""The parts of a transformer block: linear layers that take an adapter, attention, feed-forward, LayerScale."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.models.backbones.rope import Rotation, rotate

FfnKind = Literal["mlp", "swiglu"]
MOST_TOKENS = 1400  # with more, a head's scores leave the cache, and torch's fused kernel is faster
MOST_TRAINED_TOKENS = 640  # with more, plain matmuls would hold too much for the gradient for what they gain
SCORE_BYTES = 2**20  # in work at a time, per thread


class AdaptableLinear(nn.Linear):
    """A linear layer whose output an adapter (LoRA) may add to, under the name `adapter`, so that no other name moves.

    bias_mask: in DINOv3's qkv layers, ones and zeros that switch the bias of the keys off (dossier 5.3).
    """

    bias_mask: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, mask_k_bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.adapter: nn.Module | None = None
        mask = None
        if bias and mask_k_bias:
            mask = torch.ones(out_features)
            mask[out_features // 3 : 2 * out_features // 3] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        bias = self.bias if self.bias_mask is None else self.bias * self.bias_mask
        out = F.linear(x, self.weight, bias)
        return out if self.adapter is None else out + self.adapter(x)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys of patches are rotated where the backbone uses rotary positions."""

    def __init__(self, dim: int, *, num_heads: int, qkv_bias: bool, mask_k_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = AdaptableLinear(dim, 3 * dim, bias=qkv_bias, mask_k_bias=mask_k_bias)
        self.proj = AdaptableLinear(dim, dim)

    def forward(self, x: Float[Tensor, "B N E"], rotation: Rotation | None) -> Float[Tensor, "B N E"]:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        qk, v = heads.permute(2, 0, 3, 1, 4).split((2, 1))  # (2, B, heads, N, d) and (1, ...)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.unbind(0)
        out = attend(q, k, v.squeeze(0))
        joined: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, N, E)
        return joined


def attend(
    q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
) -> Float[Tensor, "B h N d"]:
    """softmax(q k^T / sqrt(d)) v.

    In bfloat16 on the CPU plain matmuls of some heads at a time, so that their scores stay in the cache, are 1.3 to 1.5
    times as fast as torch's fused kernel, and with their gradient 1.9 to 4 times (docs/results/attention.md). They
    round scores to bfloat16: subtracting the mean key, which no softmax notices, makes these small.
    """
    most = MOST_TRAINED_TOKENS if q.requires_grad else MOST_TOKENS
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or q.shape[2] > most:
        return F.scaled_dot_product_attention(q, k, v)
    num_heads = q.shape[0] * q.shape[1]
    if not torch.compiler.is_compiling():  # which could not look at the number of threads
        num_heads = max(1, SCORE_BYTES * torch.get_num_threads() // (2 * q.shape[2] ** 2))
    parts = zip(*(part.contiguous().flatten(0, 1).split(num_heads) for part in (q, k, v)), strict=True)
    out: Tensor = torch.cat([_attend_plainly(*part) for part in parts]).unflatten(0, q.shape[:2])
    return out


def _attend_plainly(
    q: Float[Tensor, "h N d"], k: Float[Tensor, "h N d"], v: Float[Tensor, "h N d"]
) -> Float[Tensor, "h N d"]:
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ (k - k.mean(1, keepdim=True)).transpose(-2, -1)  # (h, N, N)
    return scores.softmax(-1) @ v


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = AdaptableLinear(dim, hidden)
        self.fc2 = AdaptableLinear(hidden, dim)

    def forward(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B N E"]:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """w3(silu(w1 x) * w2 x): w1 is the gate."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = AdaptableLinear(dim, hidden)
        self.w2 = AdaptableLinear(dim, hidden)
        self.w3 = AdaptableLinear(hidden, dim)

    def forward(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B N E"]:
        out: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return out


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B N E"]:
        return x * self.gamma


class Block(nn.Module):
    """Attention and feed-forward, each after a LayerNorm, scaled, and added to its input.

    depth_adapter: None, or what `add_depth_adapters` put there; it adds what a token learns from neighbouring slices.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        ffn: FfnKind,
        ffn_hidden: int,
        qkv_bias: bool,
        mask_k_bias: bool,
        norm_eps: float,
        layer_scale_init: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=qkv_bias, mask_k_bias=mask_k_bias)
        self.ls1 = LayerScale(dim, layer_scale_init)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp: nn.Module = Mlp(dim, ffn_hidden) if ffn == "mlp" else SwiGlu(dim, ffn_hidden)
        self.ls2 = LayerScale(dim, layer_scale_init)
        self.depth_adapter: nn.Module | None = None

    def forward(
        self, x: Float[Tensor, "B N E"], rotation: Rotation | None, drop_path: float = 0.0, num_slices: int = 1
    ) -> Float[Tensor, "B N E"]:
        """drop_path: the share of images that skip each of the two branches (used while training only).

        num_slices: images that are slices of one case, side by side; only a depth adapter asks.
        """
        return self.across_slices(self.within_slices(x, rotation, drop_path), num_slices)

    def across_slices(self, x: Float[Tensor, "B N E"], num_slices: int) -> Float[Tensor, "B N E"]:
        """The depth adapter alone, which must see all slices of a case at once."""
        return x if self.depth_adapter is None else x + self.depth_adapter(x, num_slices)

    def within_slices(
        self, x: Float[Tensor, "B N E"], rotation: Rotation | None, drop_path: float = 0.0
    ) -> Float[Tensor, "B N E"]:
        """Attention and feed-forward, in which every image is alone."""
        rate = drop_path if self.training else 0.0
        rows = kept_rows(x, rate)
        x = add_rows(x, self.ls1(self.attn(self.norm1(take_rows(x, rows)), rotation)), rows)
        rows = kept_rows(x, rate)
        return add_rows(x, self.ls2(self.mlp(self.norm2(take_rows(x, rows)))), rows)


class Kept(NamedTuple):
    """Images that go through a branch, and what their branch is multiplied with so that its expectation stays."""

    rows: Tensor
    scale: float


def kept_rows(x: Tensor, rate: float) -> Kept | None:
    """A random share of 1 - rate of the images, rounded up or down at random; None: all. Leaving the others out saves
    their arithmetic; where none would be left, one goes through and counts for nothing.
    """
    if rate == 0:
        return None
    num_kept = int(len(x) * (1 - rate) + float(torch.rand((), device="cpu")))  # whatever device is the default
    rows = torch.randperm(len(x), device=x.device)[: max(num_kept, 1)]
    return Kept(rows, 1 / (1 - rate) if num_kept else 0.0)


def take_rows(x: Tensor, kept: Kept | None) -> Tensor:
    return x if kept is None else x[kept.rows]


def add_rows(x: Tensor, branch: Tensor, kept: Kept | None) -> Tensor:
    """x plus the branch of the images that went through it."""
    if kept is None:
        return x + branch
    return x.index_add(0, kept.rows, branch.to(x.dtype), alpha=kept.scale)
