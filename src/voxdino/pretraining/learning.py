"""What self-distillation and distillation share: portions of a batch, a step down their gradient, a running average."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from voxdino.models.backbones.vit import ViT
from voxdino.pretraining.views import Views
from voxdino.training.distributed import World

Terms = dict[str, float]
P = TypeVar("P")


@dataclass(frozen=True)
class Portion:
    """Views of some of a step's images, and what is masked of their global crops."""

    views: Views
    masks: Bool[Tensor, "G N"]


class Descent:
    """AdamW on `network`, and `average`, which follows `followed`: the network or a part of it.

    groups:        parameters, and what `rates` of a step is asked about; the optimiser ignores the rest.
    is_shared_out: the weights are spread over the processes (FSDP2).
    """

    def __init__(
        self,
        network: nn.Module,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        average: nn.Module,
        followed: nn.Module,
        world: World,
        is_shared_out: bool = False,
    ) -> None:
        self.network, self.average, self.followed, self.world = network, average, followed, world
        self._is_shared_out = is_shared_out
        self._optimizer = AdamW(groups, lr=1.0, betas=betas, fused=not is_shared_out)

    def gradients(
        self,
        wrapped: nn.Module,
        portions: Sequence[P],
        terms_of: Callable[[P], dict[str, Tensor]],
        weights: Mapping[str, float],
    ) -> dict[str, Tensor]:
        """Add up the gradients of the weighted terms; the terms themselves, averaged over the portions.

        wrapped: the network as `terms_of` calls it: DistributedDataParallel's, or itself.
        """
        sums: dict[str, Tensor] = {}
        for number, portion in enumerate(portions, 1):
            with _exchange(wrapped, number == len(portions)):
                terms = terms_of(portion)
                total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
                (total / len(portions)).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / len(portions)
        return sums

    def step(
        self,
        terms: Mapping[str, Tensor],
        rates: Callable[[Mapping[str, Any]], tuple[float, float]],
        *,
        clip: float,
        momentum: float,
    ) -> Terms:
        """Down the gradients: what is told of the step, the same in all processes.

        terms: what is told, averaged over the processes. rates: group -> learning rate, weight decay.
        clip:  largest norm of the gradients. momentum: of the average.
        Not-a-number anywhere leaves everything as it was, and "skipped" is 1.
        """
        norm = float(_clip_gradients(self.network, clip))
        told = self.world.mean(torch.stack(list(terms.values()))).tolist()
        good = norm < float("inf") and all(value == value for value in told)
        if good:
            for group in self._optimizer.param_groups:
                group["lr"], group["weight_decay"] = rates(group)
            self._optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(local_tensors(self.average), local_tensors(self.followed), 1 - momentum)
        self._optimizer.zero_grad(set_to_none=True)
        return {**dict(zip(terms, told, strict=True)), "grad_norm": norm, "skipped": float(not good)}

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments by name, made where there was no step yet, so that they have names to be loaded under."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            held = self._optimizer.state[parameter]
            if not held and parameter.requires_grad:
                held["step"] = torch.zeros((), device="cpu" if self._is_shared_out else parameter.device)
                held |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            tensors |= {f"optimizer.{key}.{name}": value for key, value in held.items()}
        return tensors


def compile_blocks(*backbones: ViT) -> None:
    """torch.compile of every block by itself: parts that drop path or checkpointing wrap stay apart."""
    for backbone in backbones:
        for block in backbone.blocks:
            block.compile()


def named_tensors(**networks: nn.Module | None) -> dict[str, Tensor]:
    """The parameters' values of several networks, by network and name; where shared out, as such."""
    return {
        f"{kind}.{name}": parameter.data
        for kind, network in networks.items()
        if network is not None
        for name, parameter in network.named_parameters()
    }


def local_tensors(network: nn.Module) -> list[Tensor]:
    """The parameters' values; where they are shared out, this process's part."""
    return [
        parameter.data.to_local() if hasattr(parameter.data, "to_local") else parameter.data
        for parameter in network.parameters()
    ]


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """And buffers, which files may hold with a rounding of their own."""
    for given, taken in zip(local_tensors(source), local_tensors(target), strict=True):
        taken.copy_(given)
    for held, own in zip(source.buffers(), target.buffers(), strict=True):
        own.copy_(held)


def mixed_seed(seed: int, *parts: Any) -> int:
    """63 bits from all of them; the same on every machine."""
    words = [seed, *(int.from_bytes(str(part).encode(), "little") for part in parts)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def _exchange(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged between the processes once a step, with the last portion."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else nullcontext()


def _clip_gradients(network: nn.Module, most: float) -> Tensor:
    """Scale all gradients so that their norm is `most` at most; the norm before."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), most)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # shared out: of all processes
    return whole
