"""The report of a run as a page of tables and curves (voxdino.report draws it)."""

from collections.abc import Iterator

import numpy as np

from voxdino.benchmark.compare import interval_of, labels_of
from voxdino.benchmark.measures import MEASURES
from voxdino.benchmark.result import CellResult
from voxdino.benchmark.robustness import robustness_sections
from voxdino.benchmark.standing import Standing, values_of
from voxdino.benchmark.tasks import ClassificationTask
from voxdino.benchmark.words import LEVEL, findings, warnings
from voxdino.evaluation.classification import reliability_bins
from voxdino.evaluation.statistics import seeds_summary
from voxdino.report.page import (
    Cell,
    Column,
    CurveSection,
    FailedFile,
    FailureSection,
    ForestRow,
    ForestSection,
    Interval,
    Point,
    RankSection,
    ReliabilityBin,
    ReliabilitySection,
    ReportPage,
    Section,
    Series,
    TableSection,
    TextSection,
)


def report_page(standing: Standing) -> ReportPage:
    """Everything that was measured, the plain words first."""
    outcome = standing.outcome
    sections: list[Section] = []
    if standing.board:
        sections += [TextSection(title="What the numbers say", paragraphs=findings(standing)), leaderboard(standing)]
        sections += [_comparisons(standing)] if standing.comparisons else []
        sections += [*_ranks(standing), *_forests(standing), *_resolution_curves(standing), *_size_curves(standing)]
        sections += _reliability(standing)
    sections += [
        *_small_data(standing),
        *robustness_sections(standing),
        *_sites(standing),
        *_seeds(standing),
        *_everything(standing),
    ]
    sections += [_encoders(standing), _failures(standing)]
    facts = (
        ("encoders", str(len(outcome.encoders))),
        ("tasks", str(len(outcome.grid.tasks))),
        ("cells", str(len(outcome.results))),
        ("seeds", ", ".join(map(str, outcome.grid.seeds))),
    )
    subtitle = "Frozen encoders under probes: what their features are worth on medical images"
    return ReportPage(
        title=outcome.grid.title, subtitle=subtitle, facts=facts, warnings=warnings(standing), sections=tuple(sections)
    )


def leaderboard(standing: Standing) -> TableSection:
    """A row for each task, a column for each encoder."""
    names = tuple(standing.outcome.encoders)
    rows: list[tuple[Cell, ...]] = []
    for entry, task in standing.tasks:
        if entry.name not in standing.board:
            continue
        scores = {one.encoder.name: one for one in standing.board[entry.name]}
        first = next(iter(scores.values())).result
        cells = [scores[name].score if name in scores else None for name in names]
        rows.append((entry.name, entry.modality, task.what, len(first.cases), MEASURES[task.metric].definition, *cells))
    columns = tuple(Column(title=title) for title in ("Task", "Modality", "Probe", "Test cases", "Score"))
    note = "Mean over test cases (AUROC: of all together) with 95 % interval. Each encoder stands here with the "
    note += "resolution of its best score on the validation cases, of equals the smaller one; the test cases choose "
    chosen_by = dict.fromkeys(f"in {task.kind} the {MEASURES[task.chosen_by].name}" for _, task in standing.tasks)
    note += f"nothing. That score is {', '.join(chosen_by)}; of segmentations a fifth of the training cases validates."
    return TableSection(
        title="Leaderboard",
        columns=columns + tuple(Column(title=name, digits=3) for name in names),
        rows=tuple(rows),
        note=note,
    )


def _comparisons(standing: Standing) -> TableSection:
    rows: list[tuple[Cell, ...]] = []
    for one in standing.comparisons:
        better = one.first if (one.difference.mean or 0.0) > 0 else one.second
        verdict = f"{better} is better" if one.p_holm < LEVEL else "not told apart"
        rows.append((one.task, one.first, one.second, one.difference, one.p, one.p_holm, one.detectable, verdict))
    columns = (
        Column(title="Task"),
        Column(title="A"),
        Column(title="B"),
        Column(title="A − B", digits=3),
        Column(title="p", digits=4),
        Column(title="p (Holm)", digits=4),
        Column(title="Detectable", digits=3),
        Column(title="Verdict"),
    )
    note = "Paired on the same test cases, or patients where six or more have a value: Wilcoxon's signed ranks for "
    note += "means over cases, exchange of the two encoders' ranks of each case for AUROC (1999 draws). Holm's "
    note += "correction over all rows. Detectable: the difference that this sample would show with probability 0.8."
    return TableSection(title="Paired tests", columns=columns, rows=tuple(rows), note=note)


def _ranks(standing: Standing) -> Iterator[Section]:
    if standing.ranks is None:
        return
    names, table = standing.ranks
    note = f"Over {table.num_tasks} tasks; Friedman's test of no difference: p = {table.p_value:.3f}."
    yield RankSection(
        title="Mean ranks",
        names=names,
        mean_ranks=table.mean_ranks,
        critical_difference=table.critical_difference,
        note=note,
    )


def _forests(standing: Standing) -> Iterator[Section]:
    for entry, task in standing.tasks:
        entries = standing.board.get(entry.name, [])
        rows = tuple(ForestRow(one.encoder.name, one.score) for one in entries if one.score.mean is not None)
        if len(rows) > 1:
            yield ForestSection(title=f"{entry.name}: encoders", axis_label=MEASURES[task.metric].name, rows=rows)


def _resolution_curves(standing: Standing) -> Iterator[Section]:
    for entry, task in standing.tasks:
        series = []
        for name in standing.outcome.encoders:
            known = standing.whole(entry.name, name)
            points = [_point(float(one.cell.resolution), interval_of(one, task.metric)) for one in known]
            series.append(Series(name=name, points=tuple(point for point in points if point is not None)))
        yield from _curve(f"{entry.name}: resolution", "pixels", task.metric, series, is_log=True)


def _size_curves(standing: Standing) -> Iterator[Section]:
    """Where pretrained encoders of different sizes were measured."""
    for entry, task in standing.tasks:
        entries = [one for one in standing.board.get(entry.name, []) if one.encoder.kind == "pretrained"]
        ordered = sorted(entries, key=lambda one: one.encoder.card.num_parameters)
        points = [_point(one.encoder.card.num_parameters / 1e6, one.score) for one in ordered]
        series = [Series(name="pretrained", points=tuple(point for point in points if point is not None))]
        yield from _curve(f"{entry.name}: model size", "million weights", task.metric, series, is_log=True)


def _reliability(standing: Standing) -> Iterator[Section]:
    """Of the encoder with the highest score of each task that classifies."""
    for task, entries in standing.board.items():
        known = [one for one in entries if one.result.probabilities and one.score.mean is not None]
        if known:
            best = max(known, key=lambda one: one.score.mean or 0.0)
            bins = reliability_bins(labels_of(best.result), np.array(best.result.probabilities))
            drawn = tuple(ReliabilityBin(each.confidence, each.accuracy, each.count) for each in bins)
            yield ReliabilitySection(title=f"{task}: reliability of {best.encoder.name}", bins=drawn)


def _small_data(standing: Standing) -> Iterator[Section]:
    """Curves over the number of training cases, and their numbers."""
    rows: list[tuple[Cell, ...]] = []
    for entry, task in standing.tasks:
        series = []
        for name in standing.outcome.encoders:
            points = []
            for number, results in standing.few(entry.name, name).items():
                values = values_of(results, task.metric)
                if not values:
                    continue
                mean, sd = seeds_summary(values)
                low, high = (None, None) if sd is None else (mean - sd, mean + sd)
                points.append(Point(x=float(number), y=mean, low=low, high=high))
                rows.append((entry.name, name, number, mean, sd, len(values)))
            series.append(Series(name=name, points=tuple(points)))
        what = "training cases per class" if isinstance(task, ClassificationTask) else "training cases"
        yield from _curve(f"{entry.name}: few cases", what, task.metric, series, is_log=True)
    if rows:
        titles = ("Task", "Encoder", "Cases", "Score", "SD", "Seeds")
        columns = tuple(Column(title=title, digits=3 if title in ("Score", "SD") else None) for title in titles)
        note = "Mean and standard deviation over seeds, each with its own cases drawn."
        yield TableSection(title="Few cases", columns=columns, rows=tuple(rows), note=note)


def _sites(standing: Standing) -> Iterator[Section]:
    rows: list[tuple[Cell, ...]] = []
    for entry, task in standing.tasks:
        for name in standing.outcome.encoders:
            for one in standing.sites(entry.name, name):
                score = interval_of(one, task.metric)
                rows.append((entry.name, one.cell.site, name, one.cell.resolution, len(one.cases), score))
    if rows:
        titles = ("Task", "Held-out site", "Encoder", "Resolution", "Test cases", "Score")
        columns = tuple(Column(title=title, digits=3 if title == "Score" else None) for title in titles)
        note = "All cases of a site, by a probe of the other sites. The intervals are over the cases of the site: they "
        note += "speak of this site alone, not of others."
        yield TableSection(title="Held-out sites", columns=columns, rows=tuple(rows), note=note)


def _seeds(standing: Standing) -> Iterator[Section]:
    """Of probes that train, where several seeds were run."""
    rows: list[tuple[Cell, ...]] = []
    for entry, task in standing.tasks:
        for one in standing.board.get(entry.name, []):
            values = values_of(standing.seeds(one.result), task.metric)
            if len(values) > 1:
                mean, sd = seeds_summary(values)
                rows.append((entry.name, one.encoder.name, mean, sd, len(values)))
    if rows:
        titles = ("Task", "Encoder", "Mean", "SD", "Seeds")
        columns = tuple(Column(title=title, digits=4 if title in ("Mean", "SD") else None) for title in titles)
        yield TableSection(title="Seeds", columns=columns, rows=tuple(rows))


def _everything(standing: Standing) -> Iterator[Section]:
    """All metrics of all cells with all training cases, a table for each kind of task."""
    tasks = {entry.name: task for entry, task in standing.tasks}
    for kind in dict.fromkeys(task.kind for task in tasks.values()):
        results = [one for one in standing.outcome.results if tasks[one.cell.task].kind == kind and one.cell.is_whole]
        if not results:
            continue
        metrics = tasks[results[0].cell.task].metrics
        rows = tuple(_row(one, metrics) for one in results)
        titles = ("Task", "Encoder", "Resolution", "Seed", "Training", "Test", "Validation")
        columns = tuple(Column(title=title, digits=3 if title == "Validation" else None) for title in titles)
        columns += tuple(Column(title=MEASURES[m].name, digits=3, better=MEASURES[m].better) for m in metrics)
        ids = "; ".join(f"{MEASURES[metric].name}: {MEASURES[metric].definition}" for metric in metrics)
        yield TableSection(title=f"All numbers: {kind}", columns=columns, rows=rows, note=f"Definitions: {ids}.")


def _row(result: CellResult, metrics: tuple[str, ...]) -> tuple[Cell, ...]:
    cell = result.cell
    known = (cell.task, cell.encoder, cell.resolution, cell.seed, result.num_train, len(result.cases))
    return (*known, result.validation, *(interval_of(result, metric) for metric in metrics))


def _encoders(standing: Standing) -> TableSection:
    rows = tuple(
        (
            name,
            encoder.kind,
            encoder.card.num_parameters / 1e6,
            encoder.patch_size,
            encoder.card.licence,
            encoder.card.file_digest[:16],
        )
        for name, encoder in standing.outcome.encoders.items()
    )
    columns = (
        Column(title="Encoder"),
        Column(title="Kind"),
        Column(title="Weights", unit="M", digits=1),
        Column(title="Patch", unit="px"),
        Column(title="Licence"),
        Column(title="SHA-256 of the weights"),
    )
    return TableSection(title="Encoders", columns=columns, rows=rows)


def _failures(standing: Standing) -> FailureSection:
    items = [FailedFile(name, reason) for name, reason in standing.outcome.failed.items()]
    for result in standing.outcome.results:
        items += [FailedFile(f"{result.cell}: {case}", reason) for case, reason in result.failed.items()]
    return FailureSection(title="What failed", items=tuple(items))


def _point(x: float, score: Interval) -> Point | None:
    return None if score.mean is None else Point(x=x, y=score.mean, low=score.low, high=score.high)


def _curve(title: str, x_label: str, metric: str, series: list[Series], *, is_log: bool) -> Iterator[Section]:
    """Nothing where no line has two points."""
    drawn = tuple(one for one in series if one.points)
    if any(len({point.x for point in one.points}) > 1 for one in drawn):
        yield CurveSection(title=title, x_label=x_label, y_label=MEASURES[metric].name, series=drawn, x_is_log=is_log)
