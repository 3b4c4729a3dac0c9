"""Results to a page: one result with all it has, or several compared."""

from collections.abc import Sequence
from pathlib import Path

from voxdino.core.errors import UsageError
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.evaluation.scores import Scores
from voxdino.preparation.dataset import read_dataset
from voxdino.preparation.plan import Plan
from voxdino.report.class_sections import class_facts, class_sections
from voxdino.report.compare import comparison_sections
from voxdino.report.page import FailedFile, FailureSection, GallerySection, ReportPage, Section
from voxdino.report.pictures import gallery_section
from voxdino.report.results import Result, read_results
from voxdino.report.run_sections import cost_section, curve_sections, run_facts, run_warnings, settings_section
from voxdino.report.score_sections import failure_section, score_facts, score_sections

VALIDATION = "validation"  # where `voxdino run` leaves predictions


def make_page(
    paths: Sequence[Path], *, dataset: Path | None = None, labels: LabelSet | None = None, title: str | None = None
) -> ReportPage:
    """The page of one result, or of several side by side.

    paths:   each a run's folder, a folder of predictions with scores.json, or a file of scores.
    dataset: with the images: the lowest, middle and highest case are then drawn (of one result that has scores).
    labels:  what label values mean, where neither the plan of the run nor the data set says so.
    Errors: DatasetError, ConfigError naming the file; UsageError for labels of unknown meaning; those of reading.
    """
    results = read_results(paths)
    if len(results) == 1:
        return _page_of_one(results[0], dataset, labels, title)
    return _page_of_several(results, title)


def _page_of_one(result: Result, dataset: Path | None, labels: LabelSet | None, title: str | None) -> ReportPage:
    facts: list[tuple[str, str]] = []
    warnings: list[str] = []
    sections: list[Section] = []
    if result.scores is not None:
        facts += score_facts(result.scores)
        warnings += result.scores.warnings
        whole = score_sections(result.scores)
        gallery = [] if dataset is None else [_gallery(result.scores, result.folder, dataset, labels)]
        sections += [*whole[:-2], *gallery, failure_section(result.scores)]
    if result.classes is not None:
        facts += class_facts(result.classes)
        warnings += result.classes.warnings
        sections += class_sections(result.classes)
    if result.run is not None:
        facts += run_facts(result.run)
        warnings += run_warnings(result.run)
        sections += [*curve_sections(result), cost_section(result.run)]
    if result.scores is not None:
        sections += whole[-2:]
    if result.run is not None:
        sections.append(settings_section(result.run))
    told = {(True, True): "A run and its scores", (True, False): "A run", (False, True): "Scores of predictions"}
    has_scores = result.scores is not None or result.classes is not None
    return ReportPage(
        title=title or result.name,
        subtitle=told[result.run is not None, has_scores],
        facts=tuple(facts),
        warnings=tuple(dict.fromkeys(warnings)),
        sections=tuple(sections),
    )


def _page_of_several(results: Sequence[Result], title: str | None) -> ReportPage:
    scored = [result.scores for result in results if result.scores is not None]
    cases = [{row.case for row in scores.cases} for scores in scored]
    shared = len(set.intersection(*cases)) if cases else 0
    warnings = [f"{r.name}: {words}" for r in results if r.run is not None for words in run_warnings(r.run)]
    warnings += [f"{r.name}: scores of classifiers are not compared." for r in results if r.classes is not None]
    if any(len(one) != shared for one in cases):
        warnings.append(f"The results are of different cases; they share {shared}, over which they are compared.")
    if len({tuple(sorted(scores.definitions.items())) for scores in scored}) > 1:
        warnings.append("The results were measured by different definitions or metrics: compare with care.")
    warnings += [words for scores in scored for words in scores.warnings]
    failed = tuple(
        FailedFile(f"{r.name}: {one.case}", one.message) for r in results if r.scores for one in r.scores.failed
    )
    facts = [("results", str(len(results))), ("cases in common", str(shared))]
    return ReportPage(
        title=title or "Comparison",
        subtitle=", ".join(result.name for result in results),
        facts=tuple(facts),
        warnings=tuple(dict.fromkeys(warnings)),
        sections=(*comparison_sections(results), FailureSection(title="What failed", items=failed)),
    )


def _gallery(scores: Scores, folder: Path, dataset: Path, labels: LabelSet | None) -> GallerySection:
    """Read as the run's plan says, where there is one."""
    options = ReadOptions()
    if (folder / "plan.json").is_file():
        plan = Plan.read(folder / "plan.json")
        options, labels = plan.read_options, labels or plan.labels
    found = read_dataset(dataset, options, labels=labels)
    if found.labels is None:
        fix = "name them with --labels plan.json of the run (or labels.json)."
        raise UsageError("the data set does not say what its label values mean.", where=dataset, fix=fix)
    cases = {case.id: case for case in (*found.cases, *found.test_cases) if case.label is not None}
    inside = folder / VALIDATION
    return gallery_section(scores, cases, inside if inside.is_dir() else folder, found.labels, options)
