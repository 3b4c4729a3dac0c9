"""Reference cases of the losses, in the same form as those of the models (voxdino.models.reference)."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from voxdino.models.reference import Case
from voxdino.training.losses import dinomed3d


def _dinomed3d_loss(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    loss = dinomed3d(tensors["input.logits"], tensors["input.labels"].long(), ignore_index=255)
    yield loss.reshape(1), tensors["output.total"]


CASES: dict[str, Case] = {
    "dinomed3d_loss": _dinomed3d_loss,
}
