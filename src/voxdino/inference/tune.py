"""What a finished model does best with its predictions, and what haste costs it, measured on cases it never saw."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from voxdino.core.errors import DatasetError
from voxdino.core.io import read_label_map
from voxdino.core.volume import LabelMap
from voxdino.inference.load import LoadedModel
from voxdino.inference.outputs import output_to_score
from voxdino.inference.postprocess import FILE_NAME, Postprocessing, choose_postprocessing, mean_dice
from voxdino.inference.run import output_file, predict_cases
from voxdino.inference.settings import FAST_NAME, FastCost, PredictSettings, hasty
from voxdino.preparation.case import Case
from voxdino.preparation.check import Progress

FOLDER = "tuning"


def tune(
    model: LoadedModel, run_folder: Path, cases: Sequence[Case], *, on_progress: Progress | None = None
) -> tuple[Postprocessing, FastCost]:
    """Predict held-back cases twice, choose the cleaning up and measure --fast; both are written into the run folder.

    The predictions stay in RUN/tuning. Errors: DatasetError where no case has a reference; as `predict_cases`.
    """
    known = [case for case in cases if case.label is not None]
    if not known:
        fix = "give the data set that the model was fine-tuned on."
        raise DatasetError("none of the run's held-back cases has a reference here.", where=run_folder, fix=fix)
    labels, options = model.plan.labels, model.plan.read_options
    usual, output = PredictSettings(), output_to_score(known, model.plan.ndim)
    seconds, dice = [], []
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)

    def pairs(folder: Path) -> Iterator[tuple[LabelMap, LabelMap]]:
        for case in known:
            assert case.label is not None
            reference = read_label_map(case.label, options=options, like=case.images[0])
            yield read_label_map(output_file(case, folder, output)), reference

    for name, settings in (("usual", usual), ("fast", hasty(usual))):
        folder = run_folder / FOLDER / name
        done = predict_cases(known, model, folder, settings=settings, output=output, on_progress=on_progress)
        seconds.append(done.elapsed_s)
        dice.append(mean_dice(pairs(folder), labels))
    chosen = choose_postprocessing(lambda: pairs(run_folder / FOLDER / "usual"), labels)
    cost = FastCost(
        num_cases=len(known),
        device=model.device.type,
        dice=round(dice[0], 4),
        dice_fast=round(dice[1], 4),
        seconds=seconds[0],
        seconds_fast=seconds[1],
    )
    chosen.write(run_folder / FILE_NAME)
    cost.write(run_folder / FAST_NAME)
    return chosen, cost
