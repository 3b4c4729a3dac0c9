"""Logits must be numbers."""

from voxdino.core.errors import CheckpointError


def require_finite_logits(is_finite: bool, first: int) -> None:
    """CheckpointError for NaN among logits from slice `first` on, which an argmax would take for a class."""
    if not is_finite:
        fix = "predict with autocast off; if that does not help, the model is broken: train it again."
        raise CheckpointError(f"the model gives NaN or infinite scores in slice {first} or after it.", fix=fix)
