"""What self-distillation minimises: DINO, iBOT, KoLeo and Gram terms, and the Sinkhorn-Knopp targets of the first two.

Written from the dossier (5.7) and the papers: DINO (arXiv 2104.14294), iBOT (2111.07832), DINOv2 (2304.07193), DINOv3
(2508.10104); numbers agree with `pretraining.reference`. All of them compute in float32, whatever comes in and also
under autocast.

`group`: processes that share a batch; None: this process alone, whether torch.distributed is set up or not. Each
process gives its own rows, of equally many images. A loss averaged over the processes, and gradients averaged as
DistributedDataParallel does, are those of one process with all the rows.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Group = dist.ProcessGroup

_LOWEST = torch.finfo(torch.float32).min
_TINY = torch.finfo(torch.float32).tiny
_KOLEO_EPS = 1e-8
_CACHED_VALUES = 2**19


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "N K"],
    *,
    temperature: float,
    num_iterations: int = 3,
    group: Group | None = None,
) -> Float[Tensor, "N K"]:
    """The teacher's targets: probabilities per row, after shares of the K prototypes were made even over all rows.

    Each iteration gives every prototype the same mass over the rows of all processes, then every row a sum of 1. The
    number of rows may differ between processes, and be 0. No logit is too large or too small: the first round is done
    with logarithms, after which no sum is below 1 / max(N, K).
    """
    assert num_iterations >= 1, "a round is needed to make rows sum to 1"
    shares = logits.to(torch.float32, copy=True)
    parts = _some_rows(shares)
    for part in parts:
        part /= temperature
    columns = _logsumexp_of_columns(parts, group)
    total = torch.zeros_like(columns)
    for part in parts:
        part -= columns
        part -= part.logsumexp(dim=1, keepdim=True).clamp(min=_LOWEST)
        total += part.exp_().sum(dim=0)
    for _ in range(num_iterations - 1):
        divisor, total = _summed(total, group).clamp(min=_TINY), torch.zeros_like(total)
        for part in parts:
            part /= divisor
            part /= part.sum(dim=1, keepdim=True).clamp(min=_TINY)
            total += part.sum(dim=0)
    return shares


def _logsumexp_of_columns(parts: Sequence[Float[Tensor, "_ K"]], group: Group | None) -> Float[Tensor, "K"]:
    """Over the rows of all parts and processes; very low, not minus infinity, where there are none."""
    largest = parts[0].new_full(parts[0].shape[1:], float("-inf"))
    for part in parts:
        if len(part):
            largest = torch.maximum(largest, part.amax(dim=0))
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    largest = largest.clamp(min=_LOWEST)
    total = torch.zeros_like(largest)
    for part in parts:
        total += (part - largest).exp_().sum(dim=0)
    return (largest + _summed(total, group).log()).clamp(min=_LOWEST)


def _summed(values: Tensor, group: Group | None) -> Tensor:
    """Over the processes; in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def dino_loss(
    student: Float[Tensor, "S B K"],
    teacher: Float[Tensor, "T B K"],
    *,
    student_temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's logits for S crops against the teacher's probabilities for T crops of B images.

    Mean over images and pairs of crops; ignore_diagonal: without pairs of a crop with itself (crop s = crop t).
    """
    num_same = min(len(student), len(teacher)) if ignore_diagonal else 0
    num_pairs = len(student) * len(teacher) - num_same
    assert num_pairs, "one crop has no other one to be compared with"
    teacher = teacher.float()
    wanted = teacher.sum(dim=0).repeat(len(student), 1, 1)  # (S, B, K): each student crop against its teachers' sum
    wanted[:num_same] -= teacher[:num_same]
    entropies = _cross_entropy(student.flatten(0, 1), wanted.flatten(0, 1), student_temperature)
    return entropies.mean() * len(student) / num_pairs


def ibot_loss(
    student: Float[Tensor, "M K"],
    teacher: Float[Tensor, "M K"],
    *,
    weights: Float[Tensor, "M"],
    num_images: int,
    student_temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Cross-entropy of M masked patches: logits of the student, which saw the mask token, against probabilities.

    weights:    1 / number of masked patches of its image, so that every image counts the same.
    num_images: global crops of this process, those without a mask included. No masked patch at all: 0.
    """
    return (_cross_entropy(student, teacher, student_temperature) * weights).sum() / num_images


def _cross_entropy(
    logits: Float[Tensor, "M K"], wanted: Float[Tensor, "M K"], temperature: float
) -> Float[Tensor, "M"]:
    """Of each row of logits, over a temperature, against its probabilities."""
    entropies: Tensor = _CrossEntropy.apply(logits, wanted, temperature)  # type: ignore[no-untyped-call]
    return entropies


class _CrossEntropy(torch.autograd.Function):
    """Some rows at a time, forward and backward: of 65536 prototypes the log-probabilities of all rows, their products
    and gradients would each fill the memory and pass through it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        entropies = []
        for given, probabilities in zip(_some_rows(logits), _some_rows(wanted), strict=True):
            log_probabilities = (given.float() / temperature).log_softmax(dim=-1)
            entropies.append(-log_probabilities.mul_(probabilities).sum(dim=-1))
        ctx.save_for_backward(logits, wanted)
        ctx.temperature = temperature
        return torch.cat(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, wanted = ctx.saved_tensors
        slopes = torch.empty_like(logits)
        parts = map(_some_rows, (logits, wanted, slopes, (gradient / ctx.temperature)[:, None].expand_as(logits)))
        for given, probabilities, slope, factor in zip(*parts, strict=True):
            said = (given.float() / ctx.temperature).softmax(dim=-1)
            said *= probabilities.sum(dim=-1, keepdim=True, dtype=torch.float32)
            slope.copy_(said.sub_(probabilities).mul_(factor))
        return slopes, None, None


def _some_rows(values: Float[Tensor, "N K"]) -> tuple[Float[Tensor, "_ K"], ...]:
    """Views of as many rows as stay in a processor's cache while they are worked on; of larger parts on a GPU."""
    most = _CACHED_VALUES if values.device.type == "cpu" else 64 * _CACHED_VALUES
    parts: tuple[Tensor, ...] = values.split(max(1, most // values.shape[1]))
    return parts


def koleo_loss(features: Float[Tensor, "B E"], *, group: Group | None = None) -> Float[Tensor, ""]:
    """-log of the distance to the nearest neighbour, mean over rows normalised to length 1: spreads class tokens.

    features: class tokens before the head, of one crop of each image, not normalised.
    group:    neighbours are sought among all its processes, which give equally many rows; gradients reach them.
    A row that is alone has no neighbour: 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.float(), dim=-1, eps=_KOLEO_EPS)
        everyone = own if group is None else _gather(own, group)
        if len(everyone) < 2:
            return own.sum() * 0
        first = 0 if group is None else dist.get_rank(group) * len(own)
        with torch.no_grad():
            similarities = own @ everyone.T
            similarities.diagonal(first).fill_(float("-inf"))  # not a row with itself
            nearest = similarities.argmax(dim=1)
        distances = F.pairwise_distance(own, everyone[nearest], eps=_KOLEO_EPS)
        return -(distances + _KOLEO_EPS).log().mean()


def _gather(own: Float[Tensor, "B E"], group: Group) -> Float[Tensor, "W E"]:
    """The rows of all processes, in the order of their ranks; gradients find their way back."""
    gathered: Tensor = _Gather.apply(own, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Backward: a row's gradient is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.num_rows = group, len(own)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = _summed(gradient.clone(memory_format=torch.contiguous_format), ctx.group)
        first = dist.get_rank(ctx.group) * ctx.num_rows
        return total[first : first + ctx.num_rows], None


def gram_loss(
    student: Float[Tensor, "B N E"],
    teacher: Float[Tensor, "B N E"],
    *,
    level: Literal["image", "batch"] = "image",
    remove_negative: bool = False,
    remove_teacher_negative: bool = False,
) -> Float[Tensor, ""]:
    """MEAN squared difference of the cosine similarities between patches, student against Gram teacher.

    The papers write the squared Frobenius norm of the difference, N x N times as much: weights are not interchangeable.

    level:                   similarities within each image, or also between patches of different images (of this
                             process), which takes B times the memory.
    remove_negative:         similarities below 0 count as 0, on both sides.
    remove_teacher_negative: on the teacher's side alone: what it finds opposed shall become orthogonal.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = _similarities(student, level), _similarities(teacher, level)
        if remove_negative:
            ours = ours.clamp(min=0)
        if remove_negative or remove_teacher_negative:
            theirs = theirs.clamp(min=0)
        return F.mse_loss(ours, theirs)


def _similarities(patches: Float[Tensor, "B N E"], level: str) -> Float[Tensor, "G P P"]:
    """Cosines of all pairs; G = B images of P = N patches, or G = 1 batch of P = B * N."""
    unit = F.normalize(patches.float(), dim=-1)
    if level == "batch":
        unit = unit.flatten(0, 1).unsqueeze(0)
    return unit @ unit.transpose(1, 2)
