"""Which predicted cases the backbone of a model has seen before, in the pool that it was pretrained on."""

from collections.abc import Sequence
from pathlib import Path

from voxdino.core.errors import UsageError
from voxdino.inference.load import ModelCard
from voxdino.inference.run import RECORD_NAME, PredictRecord


def seen_in_pretraining(predictions: Path, runs: Sequence[Path]) -> tuple[str, ...]:
    """Cases of predictions.json of which an input was, bit by bit, in the pool of the backbone of one of the runs.

    Errors: UsageError for predictions without that record; ConfigError for a folder that is no run of ours.
    """
    path = predictions / RECORD_NAME
    if not path.is_file():
        fix = "leave --run out: which images they were made of is not recorded."
        raise UsageError("these predictions are not of voxdino predict", where=predictions, fix=fix)
    cards = [ModelCard.read(run / "model.json").backbone.pretraining for run in runs]
    pools = [pretraining for pretraining in cards if pretraining is not None]
    return tuple(
        name
        for name, case in PredictRecord.read(path).cases.items()
        if any(pool.holds(digest) for pool in pools for digest in case.inputs.values())
    )
