"""From pairs of label files to scores: read, check the grids, measure every structure, average with intervals."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from voxdino.core.errors import DatasetError, GeometryError, VoxdinoError, without_folders
from voxdino.core.geometry import Grid, format_shape
from voxdino.core.io import DICOM_SUFFIXES, image_suffix, is_image, read_label_map
from voxdino.core.io.options import ReadOptions
from voxdino.core.io.writers import case_of_output
from voxdino.core.labels import LabelSet
from voxdino.evaluation.kept import Pair, digest_pairs, take, way_to_score
from voxdino.evaluation.kept import keep as keep_scores
from voxdino.evaluation.measure import Measures, score_label_maps
from voxdino.evaluation.metric import EmptyRule
from voxdino.evaluation.metrics import USUAL_METRICS
from voxdino.evaluation.scores import FailedCase, Scores
from voxdino.evaluation.summarise import ScoredCase, summarise
from voxdino.preparation.check import Progress
from voxdino.preparation.workers import Outcome, OverCases


def evaluate(
    pairs: Sequence[tuple[str, Path, Path]],
    labels: LabelSet,
    options: ReadOptions | None = None,
    *,
    tolerance_mm: float = 1.0,
    metrics: Sequence[str] = USUAL_METRICS,
    min_overlap: float = 0.0,
    empty: EmptyRule = "undefined",
    groups: Mapping[str, str] | None = None,
    num_workers: int | None = None,
    strict: bool = False,
    kept: Sequence[Path] = (),
    on_used: Callable[[Path], None] = lambda _: None,
    keep: Path | None = None,
    over_cases: OverCases | None = None,
    on_progress: Progress | None = None,
) -> Scores:
    """Score predictions against references, each pair on its own grid: (case id, prediction file, reference file).

    A pair that cannot be read or whose grids differ is listed in `failed` and the others go on; `strict` raises its
    error instead. Voxels that carry the label set's ignore id in the reference count as background in both masks.

    metrics:     of METRICS; where one is lesion-wise, the lesions are listed per case and summarised by size too.
    min_overlap: share of a lesion that must be marked for it to count as found; 0: one voxel is enough.
    empty:       "undefined": every metric's own rule for empty masks; "score": both empty is the best value, one empty
                 the worst. Paper columns (meddinov3:hd95 ...) keep their paper's rule.
    over_cases:  where the pairs are scored; None: by threads of this process.
    kept:        files of other calls' `keep`: a pair in them is not scored again where files and settings are the same.
    on_used:     told of each of these files whose scores are of the same settings: this call's stand in their place.
    keep:        a file for the scores of the single cases.
    groups:      case id -> patient: means stay those over cases, intervals are over patients. None: over cases.
    on_progress(done, total) is called after every case. Errors: UsageError for an unknown metric.
    """
    options = options or ReadOptions()
    measures = Measures(metrics=tuple(metrics), tolerance=tolerance_mm, min_overlap=min_overlap, empty=empty)
    if not pairs:
        raise DatasetError("there is no prediction to score.", fix="check the folders of predictions and references.")

    score, how = _Score(labels, options, measures, strict), way_to_score(labels, options, measures)
    digests = digest_pairs(pairs) if kept or keep is not None else {}
    there = take(kept, how, digests, on_used)
    results: list[ScoredCase | FailedCase] = list(there.values())
    with _scoring(score, [pair for pair in pairs if pair[0] not in there], num_workers, over_cases) as scored_pairs:
        for result in scored_pairs:
            results.append(result)
            if on_progress:
                on_progress(len(results), len(pairs))
    order = {case: position for position, (case, *_) in enumerate(pairs)}
    results.sort(key=lambda result: order[_case_of(result)])
    scored = [result for result in results if isinstance(result, ScoredCase)]
    failed = [result for result in results if isinstance(result, FailedCase)]
    if keep is not None:
        keep_scores(keep, how, digests, scored)
    return summarise(scored, failed, labels, measures, groups)


@dataclass(frozen=True)
class _Score:
    """Scores a pair, here or on another machine."""

    labels: LabelSet
    options: ReadOptions
    measures: Measures
    strict: bool

    def __call__(self, pair: Pair) -> ScoredCase | FailedCase:
        case, prediction, reference = pair
        try:
            return _score_files(case, prediction, reference, self.labels, self.options, self.measures)
        except VoxdinoError as error:
            if self.strict:
                raise
            folders = {reference.parent: "reference ", prediction.parent: ""}
            return FailedCase(case=case, message=without_folders(error, folders))


@contextmanager
def _scoring(
    score: _Score, pairs: Sequence[Pair], num_workers: int | None, over_cases: OverCases | None
) -> Iterator[Iterator[ScoredCase | FailedCase]]:
    """The scores of the pairs as they come: by threads of this process, or wherever `over_cases` works."""
    if over_cases is None:
        with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
            yield pool.map(score, pairs)
        return
    with closing(over_cases(score, pairs, [case for case, *_ in pairs])) as outcomes:
        yield (_end_of(outcome, pairs[outcome.index][0], score.strict) for outcome in outcomes)


def _end_of(outcome: Outcome[ScoredCase | FailedCase], case: str, strict: bool) -> ScoredCase | FailedCase:
    if outcome.fault is None:
        assert outcome.value is not None
        return outcome.value
    if strict:
        raise outcome.fault.error
    return FailedCase(case=case, message=str(outcome.fault.error))


def _case_of(result: ScoredCase | FailedCase) -> str:
    return result.case if isinstance(result, FailedCase) else result.rows[0].case


def prediction_options(options: ReadOptions, labels: LabelSet) -> ReadOptions:
    """How to read a prediction: it speaks in declared ids already, so that only mappings of foreign values apply.

    DICOM SEG and RTSTRUCT, which may number anew, speak in the labels' names.
    """
    foreign = tuple((value, meant) for value, meant in options.label_map if value not in labels.ids)
    return options.model_copy(update={"label_map": foreign, "segments": options.segments or tuple(labels.foreground)})


def pair_files(predictions: Path, references: Mapping[str, Path]) -> list[tuple[str, Path, Path]]:
    """The pairs to evaluate: for every reference, the image file in `predictions` that is named after its case.

    A file that names no case of `references` is left alone. Errors: DatasetError listing the cases without one.
    """
    found = {case_of_output(path): path for path in sorted(predictions.glob("*")) if is_image(path)}
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
    measures: Measures,
) -> ScoredCase:
    like = None if image_suffix(reference_file) in DICOM_SUFFIXES else reference_file  # SEG leaves empty slices out
    prediction = read_label_map(prediction_file, options=prediction_options(options, labels), like=like)
    reference = read_label_map(reference_file, options=options, like=prediction_file)
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
        measures=measures,
    )
    volume_unit = grid.unit if grid.unit == "px" else "ml" if grid.ndim == 3 else "mm²"
    return ScoredCase(rows, grid.unit, volume_unit)


def _difference(prediction: Grid, reference: Grid) -> str:
    if prediction.shape != reference.shape:
        return f"{format_shape(prediction.shape)} voxels, but its reference has {format_shape(reference.shape)}."
    offset = prediction.largest_offset(reference)
    return f"lies up to {offset:.3g} {reference.unit} away from its reference's grid."
