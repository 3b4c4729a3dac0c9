"""Several results side by side: who is better, by how much, and whether this sample could have shown it."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np

from voxdino.core.safe_files import digest_json
from voxdino.evaluation.comparison import holm, paired_test, rank_table, smallest_detectable_difference
from voxdino.evaluation.scores import Scores
from voxdino.evaluation.statistics import (
    few_groups,
    groups_to_draw,
    mean_interval,
    owners_of,
    seeds_summary,
    sum_groups,
)
from voxdino.report.page import (
    Cell,
    Column,
    CurveSection,
    ForestRow,
    ForestSection,
    Interval,
    RankSection,
    Section,
    TableSection,
    TextSection,
)
from voxdino.report.results import Result
from voxdino.report.run_sections import validation_curve
from voxdino.report.score_sections import (
    FACTS,
    interval_of,
    main_metric,
    metric_column,
    metric_heading,
    summary_cells,
    values_by_case,
)
from voxdino.report.texts import number, p_value

LEVEL = 0.05
LOWER_IS_BETTER = frozenset({"hd95", "assd"})

Values = dict[str, dict[str, float]]  # name of the result -> case -> value


def comparison_sections(results: Sequence[Result]) -> tuple[Section, ...]:
    """Leaderboard, intervals, paired tests over the cases that all share, ranks, seeds and learning curves."""
    scored = [(result.name, result.scores) for result in results if result.scores is not None]
    sections: list[Section] = []
    metric = main_metric(scored[0][1]) if scored else None
    if metric is not None:
        values = _shared({name: values_by_case(scores, metric) for name, scores in scored})
        sections += [_leaderboard(scored), _forest(scored, metric), _structures(scored, metric)]
        if len(values) > 1 and all(values.values()):
            sections += _tests(values, [scores.groups for _, scores in scored], metric)
    seeds = _seeds(results, metric) if metric is not None else None
    curves = tuple(curve for r in results if (curve := validation_curve(r.log, r.name)).points)
    if seeds is not None:
        sections.append(seeds)
    if curves:
        title = "Validation Dice while training"
        sections.append(CurveSection(title=title, x_label="step", y_label="Dice", series=curves))
    return tuple(sections)


def _shared(values: Values) -> Values:
    """Every result's values of the cases that all of them have, in one order."""
    common = [case for case in next(iter(values.values())) if all(case in one for one in values.values())]
    return {name: {case: one[case] for case in common} for name, one in values.items()}


def _leaderboard(scored: Sequence[tuple[str, Scores]]) -> TableSection:
    first = scored[0][1]
    units = {row.metric: row.unit for row in first.summary}
    metrics = [metric for metric in first.definitions if metric not in FACTS]
    columns = [
        metric_column(metric, units.get(metric, "")).model_copy(update={"better": _better(metric)})
        for metric in metrics
    ]
    rows: list[tuple[Cell, ...]] = []
    for name, scores in scored:
        cells = summary_cells(scores)
        means = (interval_of(cells["mean", m]) if ("mean", m) in cells else None for m in metrics)
        rows.append((name, scores.num_cases, *means, len(scores.failed)))
    return TableSection(
        title="Leaderboard",
        columns=(Column(title="result"), Column(title="cases"), *columns, Column(title="not scored")),
        rows=tuple(rows),
        note="Mean over cases of the structures' average, with its 95 % interval (over patients where six are known). "
        "Intervals of two results may overlap and the results still differ: the paired tests below compare case by "
        "case.",
    )


def _better(metric: str) -> Literal["higher", "lower"]:
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def _forest(scored: Sequence[tuple[str, Scores]], metric: str) -> ForestSection:
    cells = ((name, summary_cells(scores).get(("mean", metric))) for name, scores in scored)
    rows = tuple(ForestRow(name, interval_of(cell)) for name, cell in cells if cell is not None)
    name = metric_heading(metric)
    return ForestSection(title=f"{name} with intervals", axis_label=f"mean {name}", rows=rows)


def _structures(scored: Sequence[tuple[str, Scores]], metric: str) -> TableSection:
    names = dict.fromkeys(count.structure for _, scores in scored for count in scores.counts)
    columns = (Column(title="result"), *(Column(title=name, digits=3, better=_better(metric)) for name in names))
    rows = []
    for name, scores in scored:
        cells = summary_cells(scores)
        found = (cells.get((structure, metric)) for structure in names)
        rows.append((name, *(None if cell is None else interval_of(cell) for cell in found)))
    return TableSection(title=f"{metric_heading(metric)} by structure", columns=columns, rows=tuple(rows))


def _whose(cases: Collection[str], groups: Sequence[Mapping[str, str]]) -> tuple[tuple[str, ...], str, str]:
    """Whose each case is for the tests, "patients" or "cases", and why it is not patients though they are named."""
    alone = owners_of(cases, {})
    named: dict[str, set[str]] = {case: {one[case] for one in groups if case in one} for case in cases}
    if not any(named.values()):
        return alone, "cases", ""
    unlike = [case for case, patients in named.items() if len(patients) > 1]
    if unlike:
        return alone, "cases", f" The results name different patients for {len(unlike)} of them (first: {unlike[0]})."
    owners = owners_of(cases, {case: min(patients) for case, patients in named.items() if patients})
    drawn = groups_to_draw(owners)
    if drawn is None:
        return alone, "cases", f" {few_groups(len(set(owners)), len(cases))}"
    return drawn, "patients", ""


def _tests(values: Values, groups: Sequence[Mapping[str, str]], metric: str) -> list[Section]:
    """Every pair, in words too; with three results or more their ranks. Cases of one patient count as one.

    groups: case -> patient, of each result.
    """
    name = metric_heading(metric)
    arrays = {result: np.array(list(one.values())) for result, one in values.items()}
    pairs = list(combinations(arrays, 2))
    cases = next(iter(values.values()))
    owners, over, why = _whose(cases, groups)
    num = f"{len(set(owners))} {over}" + (f" ({len(cases)} cases)" if over == "patients" else "")
    ps = [paired_test(arrays[a].tolist(), arrays[b].tolist(), groups=owners) for a, b in pairs]
    rows: list[tuple[Cell, ...]] = []
    sentences = []
    for (a, b), p, adjusted in zip(pairs, ps, holm(ps), strict=True):
        differences = (arrays[a] - arrays[b]).tolist()
        found = mean_interval(differences, groups=owners)
        smallest = smallest_detectable_difference(differences, groups=owners)
        interval = Interval(mean=found.mean, low=found.low, high=found.high)
        rows.append((a, b, interval, p, adjusted, smallest))
        sentences.append(_in_words(a, b, name, found.mean or 0.0, adjusted, smallest, metric in LOWER_IS_BETTER))
    columns = (
        Column(title="result"),
        Column(title="against"),
        Column(title=f"difference in {name}", digits=4),
        Column(title="p"),
        Column(title="p, Holm"),
        Column(title="smallest to be shown", digits=4),
    )
    note = (
        f"Wilcoxon's signed-rank test over the {num} that all results share; Holm's correction for "
        f"{len(pairs)} comparisons.{why} Smallest to be shown: the difference that a paired t-test over so many "
        f"{over}, spread as these, finds in 4 of 5 samples."
    )
    sections: list[Section] = [
        TextSection(title="In words", paragraphs=tuple(sentences)),
        TableSection(title="Paired tests", columns=columns, rows=tuple(rows), note=note),
    ]
    if len(values) > 2:
        means = {result: np.divide(*sum_groups(scores, owners)) for result, scores in arrays.items()}
        sections.append(_ranks(means, name, metric, over))
    return sections


def _in_words(
    a: str, b: str, name: str, difference: float, p: float, smallest: float | None, lower_is_better: bool
) -> str:
    if p >= LEVEL:
        could = "" if smallest is None else f"; a difference of {number(smallest)} or more would likely have shown"
        return f"{a} and {b} cannot be told apart by their {name} ({p_value(p)}){could}."
    first, second = (a, b) if (difference > 0) != lower_is_better else (b, a)
    return f"{first} is better than {second} by {number(abs(difference))} in {name} ({p_value(p)} after Holm)."


def _ranks(arrays: dict[str, np.ndarray], name: str, metric: str, over: str) -> RankSection:
    table = rank_table(np.stack(list(arrays.values()), axis=1), better=_better(metric))
    return RankSection(
        title=f"Mean ranks over the {over}",
        names=tuple(arrays),
        mean_ranks=table.mean_ranks,
        critical_difference=table.critical_difference,
        note=f"Ranks by {name} in each of {table.num_tasks} {over}, 1 is best. A bar joins results that Nemenyi's test "
        f"cannot tell apart at 5 %; all alike: {p_value(table.p_value)} (Friedman, by permutation).",
    )


def _seeds(results: Sequence[Result], metric: str) -> TableSection | None:
    """Runs of one configuration but for their seed, as mean and standard deviation; None where there are none."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.run is not None and result.scores is not None and result.scores.mean(metric) is not None:
            settings = {key: value for key, value in result.run.config.items() if key != "seed"}
            groups.setdefault(digest_json([settings, result.run.fold]), []).append(result)
    rows: list[tuple[Cell, ...]] = []
    for repeated in groups.values():
        if len(repeated) > 1:
            means = [mean for r in repeated if r.scores is not None and (mean := r.scores.mean(metric)) is not None]
            mean, deviation = seeds_summary(means)
            rows.append((", ".join(r.name for r in repeated), len(repeated), mean, deviation))
    titles = ("runs", "seeds", f"mean {metric_heading(metric)}", "SD over seeds")
    columns = tuple(Column(title=title, digits=4) for title in titles)
    return TableSection(title="Repeated with other seeds", columns=columns, rows=tuple(rows)) if rows else None
