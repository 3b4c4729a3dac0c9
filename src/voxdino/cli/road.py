"""The whole road of `run` and `demo`: prepare, fine-tune, predict the held-back cases, score them, draw them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from voxdino.cli.budget import Budget, predicting_s
from voxdino.cli.output import counting, format_seconds, relative, say
from voxdino.cli.steps import Planned, describe_config, prepare_planned
from voxdino.cli.summaries import print_scores
from voxdino.core.errors import InputError, PartialError, VoxdinoError
from voxdino.core.io import read_label_map
from voxdino.evaluation.evaluate import evaluate, prediction_options
from voxdino.evaluation.metrics import LESION_METRICS, USUAL_METRICS
from voxdino.evaluation.pictures import overlay_grid
from voxdino.evaluation.scores import FailedCase, Scores
from voxdino.finetuning.config import FinetuneConfig
from voxdino.finetuning.model import effective_plan, new_segmenter
from voxdino.finetuning.run import RunSummary, finetune, require_buildable
from voxdino.inference.load import load_model
from voxdino.inference.outputs import output_to_score
from voxdino.inference.run import RECORD_NAME, PredictRecord, output_file, predict_cases
from voxdino.models.precision import resolve_device
from voxdino.models.weights import default_weights_folder, licence_notice_once, load_backbone
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_case
from voxdino.preparation.plan import Plan

MAX_PICTURED = 3
T = TypeVar("T")


@dataclass
class Road:
    """What came out, and how long each step took."""

    workdir: Path
    run_folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    run: RunSummary | None = None
    scores: Scores | None = None

    def timed(self, step: str, do: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return do()
        finally:
            self.seconds[step] = round(time.monotonic() - started, 1)

    def error(self, set_aside: VoxdinoError | None = None) -> VoxdinoError | None:
        """What keeps the road from having ended well: cases without a score, and those set aside on the way."""
        failed = () if self.scores is None else self.scores.failed
        if self.scores is None or not failed:
            return set_aside
        kind = PartialError if self.scores.num_cases else InputError
        told = "; ".join(f"{case.case} ({case.message})" for case in failed)
        fact = f"{len(failed)} of {len(failed) + self.scores.num_cases} held-back cases have no score: {told}"
        if set_aside is not None:
            fact = f"{fact} {set_aside.fact}"
        return kind(fact, where=self.run_folder, fix="correct these files and run the same command again.")

    def to_json(self) -> dict[str, Any]:
        return {
            "workdir": str(self.workdir),
            "run_folder": str(self.run_folder),
            "seconds": self.seconds,
            "run": None if self.run is None else self.run.to_json(),
            "scores": None if self.scores is None else self.scores.to_json(),
        }


def go(
    planned: Planned,
    config: FinetuneConfig,
    *,
    workdir: Path,
    run_folder: Path,
    fold: int,
    device: str,
    num_workers: int | None,
    budget: Budget,
    lesions: bool = False,
) -> Road:
    """Go the road from a planned data set to scores and a picture in `run_folder`; done steps are not done again.

    lesions: score lesion by lesion too.
    """
    road = Road(workdir, run_folder)
    backbone, card = load_backbone(config.backbone)
    say(f"backbone {card.name}: {card.num_parameters / 1e6:.1f} M parameters, licence {card.licence}")
    if notice := licence_notice_once(card, default_weights_folder()):
        say(notice)
    require_buildable(config, planned.plan, card, device)
    road.timed("prepare", lambda: prepare_planned(planned, workdir, num_workers=num_workers))
    cases = held_back(planned, fold)
    if budget.total_s is not None:
        target, plan = resolve_device(device), effective_plan(config, planned.plan)
        model = new_segmenter(config, plan, backbone, card, target)
        reserved_s = predicting_s(workdir, plan, [case.id for case in cases], model, target)
        del model
        config = config.model_copy(update={"time_budget_s": budget.for_training_s(reserved_s)})
        say(f"{format_seconds(budget.left_s())} left, {format_seconds(reserved_s)} of it to predict and score")
    del backbone
    say(f"{describe_config(config)}, fold {fold}")
    road.run = road.timed(
        "finetune", lambda: finetune(workdir, config, run_folder=run_folder, fold=fold, device=device)
    )
    was = "finished before" if road.run.was_finished else f"ended by {road.run.ended_by}"
    say(f"{road.run.num_steps} steps in {format_seconds(road.run.elapsed_s)}, {was}")
    for name in ("scores.json", "picture.png"):  # of an earlier call
        (run_folder / name).unlink(missing_ok=True)
    failed = road.timed("predict", lambda: predict_held_back(run_folder, cases, device))
    metrics = USUAL_METRICS + (LESION_METRICS if lesions else ())
    road.scores = road.timed(
        "evaluate", lambda: score_held_back(planned.plan, run_folder, cases, failed, num_workers, metrics)
    )
    road.timed("picture", lambda: draw(planned.plan, run_folder, cases, road.scores))
    return road


def held_back(planned: Planned, fold: int) -> list[Case]:
    """The validation cases of a fold that the splits have (`finetune` complains about others)."""
    ids = set(planned.splits[fold].val) if fold < len(planned.splits) else set()
    return [case for case in planned.dataset.cases if case.id in ids]


def predict_held_back(run_folder: Path, cases: list[Case], device: str) -> dict[str, str]:
    """Predict into RUN/validation; what failed, id -> message."""
    model, folder = load_model(run_folder, resolve_device(device)), run_folder / "validation"
    with counting("predicting") as on_progress:
        try:
            output = output_to_score(cases, model.plan.ndim)
            predict_cases(cases, model, folder, output=output, overwrite=True, on_progress=on_progress, on_note=say)
        except PartialError:
            return PredictRecord.read(folder / RECORD_NAME).failed
    return {}


def score_held_back(
    plan: Plan,
    run_folder: Path,
    cases: list[Case],
    failed: dict[str, str],
    num_workers: int | None,
    metrics: Sequence[str] = USUAL_METRICS,
) -> Scores:
    """Score RUN/validation against the data set's labels into RUN/scores.json, where unpredicted cases fail too."""
    folder, output = run_folder / "validation", output_to_score(cases, plan.ndim)
    pairs = [(case.id, output_file(case, folder, output), case.label) for case in cases if case.label]
    with counting("scoring") as on_progress:
        scores = evaluate(
            pairs,
            plan.labels,
            plan.read_options,
            metrics=metrics,
            groups={case.id: case.group for case in cases if case.group is not None} or None,
            num_workers=num_workers,
            on_progress=on_progress,
        )
    told = (FailedCase(case=case.case, message=failed.get(case.case, case.message)) for case in scores.failed)
    scores = scores.model_copy(update={"failed": tuple(told)})
    scores.write(run_folder / "scores.json")
    return scores


def draw(plan: Plan, run_folder: Path, cases: list[Case], scores: Scores | None) -> None:
    """RUN/picture.png: the cases with the lowest, the middle and the highest Dice."""
    assert scores is not None
    by_dice = _by_dice(scores)
    options = prediction_options(plan.read_options, plan.labels)
    folder, output = run_folder / "validation", output_to_score(cases, plan.ndim)
    chosen = sorted({0, len(by_dice) // 2, len(by_dice) - 1})[:MAX_PICTURED] if by_dice else []
    rows = []
    for name in (by_dice[index] for index in chosen):
        case = next(case for case in cases if case.id == name)
        volume, reference = read_case(case, plan.read_options, plan.labels)
        prediction = read_label_map(output_file(case, folder, output), options=options)
        assert reference is not None
        rows.append((name, volume, reference, prediction))
    if rows:
        overlay_grid(run_folder / "picture.png", rows, plan.labels, slice_axis=plan.slice_axis or "S")


def _by_dice(scores: Scores) -> list[str]:
    """Case ids from the lowest to the highest mean Dice over their structures."""
    found: dict[str, list[float]] = {}
    for row in scores.cases:
        value = row.values.get("dice")
        if value is not None:
            found.setdefault(row.case, []).append(value)
    return sorted(found, key=lambda case: sum(found[case]) / len(found[case]))


def print_road(road: Road) -> None:
    """The table of scores, then where everything is, on stdout."""
    assert road.scores is not None
    print_scores(road.scores)
    folder = road.run_folder
    places = {
        "picture": folder / "picture.png",
        "scores": folder / "scores.json",
        "predictions": folder / "validation",
        "curves": folder / "curves.png",
        "plan": road.workdir / "plan.json",
    }
    for name, path in places.items():
        if path.exists():
            print(f"{name:<12} {relative(path)}")
    print(f"{'time':<12} {', '.join(f'{step} {format_seconds(s)}' for step, s in road.seconds.items())}")
    print(f"{'next':<12} voxdino predict IMAGE... --run {relative(folder)} --out FOLDER")
