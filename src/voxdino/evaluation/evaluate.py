"""From pairs of label files to scores: read, check the grids, measure every structure, average with intervals."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from inspect import getdoc
from math import isnan, nan, prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxdino import __version__
from voxdino.core.errors import DatasetError, GeometryError, UsageError, VoxdinoError, without_folders
from voxdino.core.geometry import Grid, format_shape
from voxdino.core.io import image_suffix, is_image, read_label_map
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.evaluation.lesions import lesion_scores, summarise_lesions
from voxdino.evaluation.masks import MaskPair, pair_masks
from voxdino.evaluation.metrics import METRICS, USUAL_METRICS
from voxdino.evaluation.scores import (
    FailedCase,
    LesionSummary,
    Outcome,
    Scores,
    StructureCounts,
    StructureScores,
    Summary,
)
from voxdino.evaluation.statistics import FEW_CASES, mean_interval
from voxdino.preparation.check import Progress


@dataclass(frozen=True)
class _ScoredCase:
    rows: tuple[StructureScores, ...]
    length_unit: str
    volume_unit: str


def evaluate(
    pairs: Sequence[tuple[str, Path, Path]],
    labels: LabelSet,
    options: ReadOptions | None = None,
    *,
    tolerance_mm: float = 1.0,
    metrics: Sequence[str] = USUAL_METRICS,
    min_overlap: float = 0.0,
    num_workers: int | None = None,
    strict: bool = False,
    on_progress: Progress | None = None,
) -> Scores:
    """Score predictions against references, each pair on its own grid: (case id, prediction file, reference file).

    A pair that cannot be read or whose grids differ is listed in `failed` and the others go on; `strict` raises its
    error instead. Voxels that carry the label set's ignore id in the reference count as background in both masks.

    metrics:     of METRICS; where one is lesion-wise, the lesions are listed per case and summarised by size too.
    min_overlap: share of a lesion that must be marked for it to count as found; 0: one voxel is enough.
    on_progress(done, total) is called after every case. Errors: UsageError for an unknown metric.
    """
    options = options or ReadOptions()
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"unknown metric '{name}'.{nearest(name, METRICS)}", fix=f"known: {', '.join(METRICS)}.")
    if not pairs:
        raise DatasetError("there is no prediction to score.", fix="check the folders of predictions and references.")

    def score(pair: tuple[str, Path, Path]) -> _ScoredCase | FailedCase:
        case, prediction, reference = pair
        try:
            return _score_files(case, prediction, reference, labels, options, tolerance_mm, metrics, min_overlap)
        except VoxdinoError as error:
            if strict:
                raise
            folders = {reference.parent: "reference ", prediction.parent: ""}
            return FailedCase(case=case, message=without_folders(error, folders))

    results: list[_ScoredCase | FailedCase] = []
    with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(score, pairs):
            results.append(result)
            if on_progress:
                on_progress(len(results), len(pairs))
    scored = [result for result in results if isinstance(result, _ScoredCase)]
    failed = [result for result in results if isinstance(result, FailedCase)]
    return _summarise(scored, failed, labels, tolerance_mm, metrics, min_overlap)


def score_label_maps(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    grid: Grid,
    labels: LabelSet,
    *,
    case: str = "",
    tolerance: float = 1.0,
    metrics: Sequence[str] = USUAL_METRICS,
    min_overlap: float = 0.0,
) -> tuple[StructureScores, ...]:
    """Score class indices (*spatial) of a prediction against those of its reference, one row per structure."""
    ignored = reference == labels.ignore_index
    if ignored.any():
        prediction, reference = np.where(ignored, 0, prediction), np.where(ignored, 0, reference)
    by_lesion = any(METRICS[metric].by_lesion for metric in metrics)
    rows = []
    for name, members in structures(labels):
        masks = [union_mask(indices, members) for indices in (prediction, reference)]
        pair = pair_masks(masks[0], masks[1], grid.spacing, tolerance=tolerance, min_overlap=min_overlap)
        values = {metric: METRICS[metric].compute(pair) for metric in metrics}
        rows.append(
            StructureScores(
                case=case,
                structure=name,
                outcome=_outcome(pair),
                values={metric: None if isnan(value) else value for metric, value in values.items()},
                lesions=lesion_scores(pair.lesions, prod(grid.spacing)) if by_lesion else None,
            )
        )
    return tuple(rows)


def structures(labels: LabelSet) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, class indices) of everything that is scored: the regions where there are any, else the classes."""
    if labels.regions:
        names = (region.name for region in labels.regions)
        return tuple(zip(names, labels.region_members(), strict=True))
    return tuple((name, (index,)) for index, (name, _) in enumerate(labels.foreground, start=1))


def union_mask(indices: NDArray[np.integer], members: Sequence[int]) -> NDArray[np.bool_]:
    """Where `indices` holds one of the class indices `members`."""
    mask: NDArray[np.bool_] = indices == members[0]
    for member in members[1:]:
        mask |= indices == member
    return mask


def prediction_options(options: ReadOptions, labels: LabelSet) -> ReadOptions:
    """How to read a prediction: it speaks in declared ids already, so that only mappings of foreign values apply."""
    foreign = tuple((value, meant) for value, meant in options.label_map if value not in labels.ids)
    return options.model_copy(update={"label_map": foreign})


def pair_files(predictions: Path, references: Mapping[str, Path]) -> list[tuple[str, Path, Path]]:
    """The pairs to evaluate: for every reference, the image file in `predictions` that is named after its case.

    A file that names no case of `references` is left alone. Errors: DatasetError listing the cases without one.
    """
    found = {
        path.name.removesuffix(image_suffix(path)): path for path in sorted(predictions.glob("*")) if is_image(path)
    }
    missing = [case for case in references if case not in found]
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        fact = f"no prediction for {len(missing)} of {len(references)} cases: {some}."
        raise DatasetError(fact, where=predictions, fix="predict them, or leave them out of the references.")
    return [(case, found[case], reference) for case, reference in references.items()]


def _score_files(
    case: str,
    prediction_file: Path,
    reference_file: Path,
    labels: LabelSet,
    options: ReadOptions,
    tolerance: float,
    metrics: Sequence[str],
    min_overlap: float,
) -> _ScoredCase:
    prediction = read_label_map(prediction_file, options=prediction_options(options, labels))
    reference = read_label_map(reference_file, options=options)
    same_shape = prediction.grid.shape == reference.grid.shape
    if not (
        same_shape
        and (options.trust_array_order or prediction.grid.same_as(reference.grid, options.geometry_tolerance))
    ):
        raise GeometryError(
            _difference(prediction.grid, reference.grid),
            where=prediction_file,
            fix=f"bring it onto the grid of {reference_file}.",
        )
    grid = reference.grid
    rows = score_label_maps(
        labels.to_indices(prediction.array, where=prediction_file),
        labels.to_indices(reference.array, where=reference_file),
        grid,
        labels,
        case=case,
        tolerance=tolerance,
        metrics=metrics,
        min_overlap=min_overlap,
    )
    volume_unit = grid.unit if grid.unit == "px" else "ml" if grid.ndim == 3 else "mm²"
    return _ScoredCase(rows, grid.unit, volume_unit)


def _difference(prediction: Grid, reference: Grid) -> str:
    if prediction.shape != reference.shape:
        return f"{format_shape(prediction.shape)} voxels, but its reference has {format_shape(reference.shape)}."
    offset = prediction.largest_offset(reference)
    return f"lies up to {offset:.3g} {reference.unit} away from its reference's grid."


def _outcome(pair: MaskPair) -> Outcome:
    claimed, there = bool(pair.prediction.any()), bool(pair.reference.any())
    if there:
        return "both" if claimed else "missed"
    return "false alarm" if claimed else "absent"


def _summarise(
    scored: Sequence[_ScoredCase],
    failed: Sequence[FailedCase],
    labels: LabelSet,
    tolerance: float,
    metrics: Sequence[str],
    min_overlap: float,
) -> Scores:
    names = [name for name, _ in structures(labels)]
    length_units = sorted({case.length_unit for case in scored}) or ["mm"]
    volume_units = sorted({case.volume_unit for case in scored}) or ["ml"]
    units = {"": "", "length": "/".join(length_units), "volume": "/".join(volume_units)}
    values = {
        metric: np.array([[_number(row.values[metric]) for row in case.rows] for case in scored]).reshape(
            -1, len(names)
        )
        for metric in metrics
    }
    columns = {(name, metric): values[metric][:, i] for i, name in enumerate(names) for metric in metrics}
    columns |= {
        ("mean", m): _mean_of_defined(values[m]) for m in metrics if METRICS[m].better
    }  # sums of ml mean nothing
    summary = []
    for (name, metric), column in columns.items():
        interval = mean_interval(column.tolist())
        summary.append(
            Summary(
                structure=name,
                metric=metric,
                definition=METRICS[metric].definition,
                unit=units[METRICS[metric].unit],
                **vars(interval),
            )
        )
    counts = tuple(_count(name, [case.rows[i].outcome for case in scored]) for i, name in enumerate(names))
    return Scores(
        voxdino_version=__version__,
        num_cases=len(scored),
        tolerance=tolerance,
        length_unit=units["length"],
        volume_unit=units["volume"],
        definitions={metric: METRICS[metric].definition for metric in metrics},
        rules={metric: getdoc(METRICS[metric].compute) or "" for metric in metrics},
        summary=tuple(summary),
        counts=counts,
        warnings=tuple(_warnings(len(scored), counts, units)),
        failed=tuple(failed),
        cases=tuple(row for case in scored for row in case.rows),
        lesions=_lesions(scored, names, units["volume"].replace("ml", "mm³"), min_overlap),
    )


def _lesions(
    scored: Sequence[_ScoredCase], names: Sequence[str], unit: str, min_overlap: float
) -> tuple[LesionSummary, ...]:
    """Per structure, where lesions were counted."""
    summaries = []
    for place, name in enumerate(names):
        cases = [lesions for case in scored if (lesions := case.rows[place].lesions) is not None]
        if cases:
            summaries.append(summarise_lesions(name, cases, unit=unit, min_overlap=min_overlap))
    return tuple(summaries)


def _number(value: float | None) -> float:
    return nan if value is None else value


def _mean_of_defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the structures of each case (num_cases, num_structures); NaN where none is defined."""
    num_defined = (~np.isnan(values)).sum(axis=1)
    total = np.nansum(values, axis=1)
    return np.where(num_defined > 0, total / np.maximum(num_defined, 1), nan)


def _count(name: str, outcomes: Sequence[Outcome]) -> StructureCounts:
    return StructureCounts(
        structure=name,
        both=outcomes.count("both"),
        missed=outcomes.count("missed"),
        false_alarm=outcomes.count("false alarm"),
        absent=outcomes.count("absent"),
    )


def _warnings(num_cases: int, counts: Sequence[StructureCounts], units: Mapping[str, str]) -> list[str]:
    warnings = []
    if num_cases < FEW_CASES:
        warnings.append(f"{num_cases} cases: intervals over fewer than {FEW_CASES} tend to be too narrow.")
    for count in counts:
        if num_cases and not count.both + count.missed:
            warnings.append(f"{count.structure} is in no reference: nothing can be said about finding it.")
    for unit in units.values():
        if "/" in unit:
            warnings.append(f"cases in different units ({unit}) are averaged: score them apart.")
    return warnings
