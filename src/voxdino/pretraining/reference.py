"""Reference cases of the losses of pretraining, in the same form as those of the models (voxdino.models.reference)."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from voxdino.models.reference import Case
from voxdino.pretraining.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp

_TEMPERATURE = 0.07  # of the stored targets
_NUM_CROPS = 2


def _dino(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    targets = sinkhorn_knopp(tensors["input.teacher_logits"], temperature=_TEMPERATURE)
    yield targets, tensors["output.teacher_targets"]
    student, teacher = (rows.unflatten(0, (_NUM_CROPS, -1)) for rows in (tensors["input.student_logits"], targets))
    yield dino_loss(student, teacher).reshape(1), tensors["output.loss_all_pairs"]
    yield dino_loss(student, teacher, ignore_diagonal=True).reshape(1), tensors["output.loss_ignore_diagonal"]


def _ibot(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    targets = sinkhorn_knopp(tensors["input.teacher_logits"], temperature=_TEMPERATURE)
    yield targets, tensors["output.teacher_targets"]
    mask = tensors["input.mask"].bool()
    weights = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1))[mask]
    loss = ibot_loss(tensors["input.student_logits"], targets, weights=weights, num_images=len(mask))
    yield loss.reshape(1), tensors["output.loss"]


def _koleo(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    yield koleo_loss(tensors["input.features"]).reshape(1), tensors["output.loss"]


def _gram(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    student, teacher = tensors["input.student"], tensors["input.teacher"]
    yield gram_loss(student, teacher).reshape(1), tensors["output.default"]
    yield gram_loss(student, teacher, remove_negative=True).reshape(1), tensors["output.remove_neg"]
    yield gram_loss(student, teacher, remove_teacher_negative=True).reshape(1), tensors["output.remove_teacher_neg"]
    yield gram_loss(student, teacher, level="batch").reshape(1), tensors["output.batch_level"]


CASES: dict[str, Case] = {
    "dino_loss": _dino,
    "ibot_loss": _ibot,
    "koleo_loss": _koleo,
    "gram_loss": _gram,
}
