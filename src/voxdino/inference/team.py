"""Who predicts: one model, folds or models that vote, with what comes before (localise) and after (clean up)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from voxdino.core.errors import UsageError
from voxdino.core.geometry import Grid
from voxdino.core.safe_files import digest_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.frame import held_channels
from voxdino.inference.load import LoadedModel, load_model
from voxdino.inference.memory import working_bytes
from voxdino.inference.postprocess import Postprocessing
from voxdino.inference.predictor import predict_volume, require_same_task
from voxdino.inference.settings import PredictSettings, hasty
from voxdino.preparation.fingerprint import bounding_box
from voxdino.preparation.plan import Plan

MARGIN_MM = 20.0  # around what the locator found (pixels where the file states no spacing)
LOCATING = hasty(PredictSettings())


@dataclass(frozen=True)
class Team:
    """Models that predict together.

    models:  vote by the mean of their logits (`predict_volume`).
    locator: a model whose foreground, with a margin, is the box that the others look into; None: they see all.
    after:   cleaning up (`Postprocessing`).
    """

    models: tuple[LoadedModel, ...]
    locator: LoadedModel | None = None
    after: Postprocessing = field(default_factory=Postprocessing)

    def __post_init__(self) -> None:
        require_same_task(self.models)
        if self.locator is not None and self.locator.plan.ndim != self.models[0].plan.ndim:
            fact = f"{self.locator.name} is for {self.locator.plan.ndim}-D images, {self.models[0].name} is not"
            raise UsageError(fact, where="--localise", fix="localise with a model of the same kind of images.")

    @property
    def plan(self) -> Plan:
        """What all share: labels, channels of a file, slice axis."""
        return self.models[0].plan

    @property
    def name(self) -> str:
        names = " + ".join(model.name for model in self.models)
        return names if self.locator is None else f"{names} in {self.locator.name}"

    @property
    def digest(self) -> str:
        """Teams of the same digest predict the same."""
        if self.locator is None and len(self.models) == 1 and not self.after.rules:
            return self.models[0].digest
        locator = None if self.locator is None else self.locator.digest
        after = self.after.model_dump(mode="json", include={"rules"})
        return digest_json({"models": [model.digest for model in self.models], "locator": locator, "after": after})

    @property
    def licence(self) -> str:
        """Of all models, each once."""
        everyone = [*self.models, *([] if self.locator is None else [self.locator])]
        return "; ".join(dict.fromkeys(model.licence for model in everyone))

    @property
    def who(self) -> tuple[str, ...]:
        return tuple(
            f"{model.name} on {model.device} ({model.card.backbone.name}, {model.licence})" for model in self.models
        )

    @property
    def magnifies(self) -> bool:
        return all(model.segmenter.backbone.depth for model in self.models)

    def working_bytes(self, grid: Grid, settings: PredictSettings) -> int:
        """See `Segmenting`."""
        alone = 0 if self.locator is None else working_bytes([_voter(self.locator, LOCATING)], grid)
        return max(alone, working_bytes([_voter(model, settings) for model in self.models], grid))

    def segment(
        self, volume: Volume, settings: PredictSettings, *, case: str, probabilities: Path | None = None
    ) -> LabelMap:
        """The label map of a volume. Where the locator finds nothing, all of the volume is looked at.

        probabilities: a file for those before cleaning up (see `predict_volume`).
        Errors: as `predict_volume`.
        """
        within = None
        if self.locator is not None:
            found = predict_volume(self.locator, volume, LOCATING, case=case)
            within = box_around(found, self.locator.plan.labels.ids[0])
        labels = predict_volume(self.models, volume, settings, case=case, within=within, probabilities=probabilities)
        return self.after.apply(labels, self.plan.labels)


def _voter(model: LoadedModel, settings: PredictSettings) -> tuple[Plan, int]:
    """See `working_bytes`; a GPU holds slabs in its own memory."""
    channels = held_channels(model.segmenter, model.plan.labels.num_outputs, settings)
    return model.plan, channels if model.device.type == "cpu" else 0


def box_around(found: LabelMap, background: int) -> Sequence[slice] | None:
    """The box of all that is not background with MARGIN_MM around it; None where there is nothing."""
    mask = found.array != background
    if not mask.any():
        return None
    return [
        slice(max(0, ends.start - margin), min(size, ends.stop + margin))
        for ends, margin, size in zip(bounding_box(mask), _margins(found.grid), mask.shape, strict=True)
    ]


def _margins(grid: Grid) -> list[int]:
    return [int(np.ceil(MARGIN_MM / length)) for length in grid.spacing]


def load_team(
    run_folders: Sequence[Path], *, localise: Path | None = None, clean_up: bool = True, device: torch.device
) -> Team:
    """The models of run folders, and what was chosen for the first of them (see `Postprocessing`) to be cleaned up.

    Errors: as `load_model`; UsageError for models that do not go together.
    """
    models = tuple(load_model(folder, device) for folder in run_folders)
    locator = None if localise is None else load_model(localise, device)
    return Team(models, locator, Postprocessing.of_run(run_folders[0]) if clean_up else Postprocessing())
