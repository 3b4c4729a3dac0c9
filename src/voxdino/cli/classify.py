"""What `voxdino finetune --data` and `voxdino predict` do for classifiers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxdino.cli.options import AUTO, Device
from voxdino.cli.output import counting, end, format_seconds, print_table, relative, say

if TYPE_CHECKING:
    from voxdino.preparation.classification import LabelledCase


def finetune_set(
    data: Path,
    run_folder: Path,
    *,
    recipe: str,
    given: Mapping[str, Any],
    settings: Mapping[str, str],
    device: Device,
    dry_run: bool,
    json: bool,
) -> None:
    """Adapt a backbone to a set of labelled images. given: what the options change; settings: the `--set` items."""
    from voxdino.finetuning.classify import finetune_classifier
    from voxdino.finetuning.classify_recipes import CLASSIFY_RECIPES
    from voxdino.models.registry import look_up
    from voxdino.preparation.classification import open_classification_set

    config = look_up(CLASSIFY_RECIPES, "classify_linear" if recipe == AUTO else recipe, kind="recipe")()
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    config = config.with_settings(settings)
    found = open_classification_set(data)
    told = f"{config.recipe}: {Path(config.backbone).stem}, {found.name}, {found.num_classes} classes ({found.kind})"
    if dry_run:
        if not json:
            print(f"would fine-tune {told}, into {relative(run_folder)}")
        end({"run_folder": str(run_folder), "config": config.to_json()}, None, as_json=json)
        return
    say(told)
    summary = finetune_classifier(found, config, run_folder=run_folder, device=device)
    if not json:
        was = "was finished before" if summary.was_finished else f"{summary.num_steps} steps"
        right = "" if summary.accuracy is None else f", accuracy {summary.accuracy:.3f}"
        print(
            f"{relative(run_folder)}  {was} in {format_seconds(summary.elapsed_s)}; validation: likelihood of the true "
            f"label {summary.likelihood:.3f}{right}"
        )
        print(f"next: voxdino predict {data} --run {relative(run_folder)} --out FOLDER")
    end(summary.to_json(), None, as_json=json)


def classify(
    inputs: Sequence[Path], run: Path, out: Path, *, strict: bool, device: Device, dry_run: bool, json: bool
) -> None:
    """Probabilities of images, or of the test cases of a labelled set, as CSV and JSON."""
    from voxdino.inference.classify import classify_cases, load_classifier
    from voxdino.models.precision import resolve_device

    cases = [case for path in inputs for case in _cases(path)]
    if dry_run:
        if not json:
            print(f"would classify {len(cases)} cases with {run} into {out}")
        end({"cases": [case.id for case in cases]}, None, as_json=json)
        return
    loaded = load_classifier(run, resolve_device(device))
    say(
        f"{len(cases)} cases with {loaded.name} on {loaded.device} ({loaded.card.backbone.name}, {loaded.card.licence})"
    )
    with counting("classifying") as on_progress:
        record = classify_cases(cases, loaded, out, strict=strict, on_progress=on_progress)
    if not json:
        counts = dict.fromkeys(record.classes, 0)
        for case in record.cases.values():
            for name in case.predicted:
                counts[name] += 1
        print(f"{relative(out / 'probabilities.csv')}  {', '.join(f'{n} {name}' for name, n in counts.items())}")
    end(record.to_json(), None, as_json=json)


def require_none(options: Mapping[str, object], fact: str) -> None:
    """Errors: UsageError naming the options of segmentation that were given all the same."""
    from voxdino.core.errors import UsageError

    if given := [name for name, value in options.items() if value]:
        raise UsageError(fact, where=", ".join(given), fix="leave it out.")


def score_classes(
    predictions: Path,
    references: Path,
    metrics: str | None,
    groups: Path | None,
    out: Path | None,
    *,
    json: bool,
    without: Mapping[str, object],
) -> None:
    """Score probabilities.csv against a labelled set. without: options of segmentation, which must not be given."""
    from voxdino.cli.references import read_groups
    from voxdino.cli.summaries import error_of
    from voxdino.evaluation.classified import evaluate_classes
    from voxdino.preparation.classification import open_classification_set

    require_none(without, "is for segmentations; these are classes.")
    known = open_classification_set(references)
    ids = [(case.id, case.file, case.file) for case in known.splits["test"]]
    patients = None if groups is None else read_groups(groups, ids)
    wanted = None if metrics is None else [name.strip() for name in metrics.split(",")]
    scores = evaluate_classes(predictions, known, metrics=wanted, groups=patients)
    path = out or predictions / "scores.json"
    scores.write(path)
    if not json:
        over = f"{scores.num_cases} cases" if scores.num_patients is None else f"{scores.num_patients} patients"
        rows = [[one.metric, *map(_number, one.score.to_json().values()), one.definition] for one in scores.summary]
        columns = ["metric", "value", "low", "high", "definition"]
        print_table(f"{known.name}: {scores.num_cases} cases, 95 % intervals over {over}", columns, rows)
        print("\n".join(scores.warnings))
    say(f"every case is in {path}")
    end(scores.to_json(), error_of(scores, predictions), as_json=json)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cases(path: Path) -> "tuple[LabelledCase, ...]":
    """The test cases of a labelled set; images and folders of images as they are."""
    from voxdino.inference.cases import find_cases
    from voxdino.preparation.classification import LabelledCase, is_classification_set, open_classification_set

    if is_classification_set(path):
        return open_classification_set(path).splits["test"]
    return tuple(LabelledCase(case.id, case.images[0], ()) for case in find_cases([path]))
