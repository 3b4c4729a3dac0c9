"""Predicting a cohort: every worker loads the model once, and writes each case's label map itself."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from voxdino.cohort.crew import LocalCrew
from voxdino.cohort.dispatch import Cohort
from voxdino.core.errors import VoxdinoError
from voxdino.inference.choose import load_segmenting
from voxdino.inference.ledger import CasePrediction, PredictRecord
from voxdino.inference.memory import require_memory_for
from voxdino.inference.run import CaseEnd, predict_one
from voxdino.inference.segmenting import Segmenting
from voxdino.preparation.case import Case

_STALL_AFTER_S = 24 * 3600.0  # a large volume on a slow processor takes hours, with a second look and mirrored


@dataclass(frozen=True)
class Models:
    """Which models to load, and how (see `load_segmenting`). Folders must be reachable under these paths everywhere."""

    folders: tuple[Path, ...]
    localise: Path | None = None
    clean_up: bool = True
    device: str = "auto"


@dataclass(frozen=True)
class Spread:
    """`Spreading`: what `predict_cases` calls in place of its own loop."""

    cohort: Cohort
    models: Models

    def __call__(
        self,
        items: Sequence[tuple[Case, CasePrediction | None]],
        how: PredictRecord,
        folder: Path,
        model: Segmenting,
    ) -> Generator[CaseEnd, None, None]:
        task = _PredictOne(self.models, how, folder.absolute())
        names = [case.id for case, _ in items]
        if isinstance(self.cohort.crew, LocalCrew):  # its workers share this machine's memory
            at_once = min(self.cohort.crew.size, len(items))
            require_memory_for([case for case, _ in items], model, how.settings, at_once=at_once)
        cohort = replace(self.cohort, stall_after_s=_STALL_AFTER_S)
        sent = [(_absolute(case), earlier) for case, earlier in items]
        with closing(cohort.over_cases(task, sent, names)) as outcomes:
            for outcome in outcomes:
                end: CasePrediction | VoxdinoError | None = outcome.value
                yield items[outcome.index][0], outcome.fault.error if outcome.fault else end


def _absolute(case: Case) -> Case:
    """Workers elsewhere have another working folder."""
    label = case.label and case.label.absolute()
    return replace(case, images=tuple(image.absolute() for image in case.images), label=label)


@dataclass(frozen=True)
class _PredictOne:
    """Travels to the workers."""

    models: Models
    how: PredictRecord
    folder: Path

    def __call__(self, item: tuple[Case, CasePrediction | None]) -> CasePrediction | None:
        return predict_one(*item, _loaded(self.models), self.how, self.folder)


@lru_cache(maxsize=1)
def _loaded(models: Models) -> Segmenting:
    """Once in a worker's life."""
    return load_segmenting(models.folders, localise=models.localise, clean_up=models.clean_up, device=models.device)
