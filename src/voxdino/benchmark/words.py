"""What the numbers say, in words: where an encoder is worth its weights, and where it fails."""

from collections.abc import Iterator
from itertools import compress

from voxdino.benchmark.compare import groups_of, value_of
from voxdino.benchmark.grid import TaskEntry, entry_of
from voxdino.benchmark.measures import MEASURES
from voxdino.benchmark.result import CellResult
from voxdino.benchmark.standing import Entry, Standing
from voxdino.benchmark.tasks import TASKS
from voxdino.evaluation.statistics import few_groups, warn_of_few

LEVEL = 0.05
LOW = {"dice": 0.5, "auroc": 0.7}  # below, a score is of little use even where it beats the floors
SAME = 0.005  # scores closer than this are told as equal


def findings(standing: Standing) -> tuple[str, ...]:
    """One paragraph for each task, and one on all of them. Every word follows from a number of the tables."""
    told = [" ".join(_of_task(standing, entry)) for entry, _ in standing.tasks if entry.name in standing.board]
    return (*_overall(standing), *told)


def warnings(standing: Standing) -> tuple[str, ...]:
    """What a reader must know before the numbers."""
    told = []
    for name in standing.outcome.absent:
        told.append(f"{name} was not there and has no row.")
    for task, entries in standing.board.items():
        metric = TASKS[entry_of(standing.outcome.grid, task).probe].metric
        told += [f"{task}: {words}" for words in _of_size(entries[0].result, metric)]
        for one in entries:
            if one.result.leaked:
                number = f"{len(one.result.leaked)} of {len(one.result.cases)} test cases"
                told.append(
                    f"{one.result.cell.task}: {number} were in the pretraining of {one.encoder.name}; "
                    "its score is not that of unseen images."
                )
    if standing.outcome.missing:
        told.append(f"{len(standing.outcome.missing)} cells are not measured yet: the budget ended first.")
    return tuple(told)


def _of_size(result: CellResult, metric: str) -> Iterator[str]:
    """What intervals and tests are over, where that is not plain or not many; cases without a value do not count."""
    is_valued = [value is not None for value in result.scores.get(metric, (0.0,) * len(result.cases))]
    num_cases, num_groups = sum(is_valued), len(set(compress(result.groups or (), is_valued)))
    is_by_group = groups_of(result, metric) is not None
    yield from warn_of_few(*((num_groups, "test patients") if is_by_group else (num_cases, "test cases")))
    if result.groups is not None and not is_by_group:
        yield few_groups(num_groups, num_cases, "patients or sites")


def _overall(standing: Standing) -> Iterator[str]:
    """In how many tasks the pretrained encoders beat every floor."""
    verdicts = [
        (entry.name, _beaten(standing, entry.name, best, floors))
        for entry, _ in standing.tasks
        if entry.name in standing.board
        for best, floors in (_sides(standing, entry.name),)
        if best is not None and floors
    ]
    if not verdicts:
        return
    good = [name for name, beats in verdicts if beats]
    bad = [name for name, beats in verdicts if not beats]
    text = f"The best pretrained encoder beats every floor (p < {LEVEL} after Holm's correction) in {len(good)} of "
    text += f"{len(verdicts)} tasks"
    yield f"{text}; not in {', '.join(bad)}." if bad else f"{text}."


def _of_task(standing: Standing, entry: TaskEntry) -> Iterator[str]:
    metric = TASKS[entry.probe].metric
    name = MEASURES[metric].name
    best, floors = _sides(standing, entry.name)
    what = f"{entry.name} ({entry.modality}, {TASKS[entry.probe].what})" if entry.modality else entry.name
    if best is None:
        ends = ", ".join(f"{one.encoder.name} {_number(one.score.mean)}" for one in floors)
        yield f"{what}: only floors were measured ({name} {ends})."
        return
    at = f"{best.encoder.name} reaches {name} {_number(best.score.mean)}{_ends(best)}"
    yield f"{what}: {at} at {best.result.cell.resolution} px."
    for floor in floors:
        yield _against(standing, entry.name, best, floor)
    if best.score.mean is not None and best.score.mean < LOW.get(metric, 0.0):
        yield f"With {name} below {LOW[metric]} the frozen features are of little use here."
    yield from _by_resolution(standing, entry.name, best, metric)
    robust = standing.robustness(entry, best.encoder.name)
    if robust is not None:
        worst = f"most under {robust.worst.replace('_', ' ')} (to {robust.means[robust.worst]:.3f})"
        yield f"Corrupted images cost it {robust.drop:.3f} on average at {robust.result.cell.resolution} px, {worst}."


def _against(standing: Standing, task: str, best: Entry, floor: Entry) -> str:
    """One comparison in a sentence."""
    name = {"pixels": "the raw pixels", "random": "random weights"}.get(floor.encoder.kind, floor.encoder.name)
    found = standing.comparison(task, best.encoder.name, floor.encoder.name)
    assert found is not None
    comparison, sign = found
    difference = sign * (comparison.difference.mean or 0.0)
    facts = f"difference {difference:+.3f}, p {_p(comparison.p_holm)} after Holm's correction"
    if comparison.p_holm < LEVEL and difference > 0:
        return f"It beats {name} ({_number(floor.score.mean)}; {facts})."
    if comparison.p_holm < LEVEL:
        return f"It fails: {name} are better ({_number(floor.score.mean)}; {facts})."
    able = "" if comparison.detectable is None else f"; this sample could have shown {comparison.detectable:.3f}"
    if difference > SAME:
        return f"It lies above {name}, but not beyond chance ({_number(floor.score.mean)}; {facts}{able})."
    return f"It fails to beat {name} ({_number(floor.score.mean)}; {facts}{able})."


def _by_resolution(standing: Standing, task: str, best: Entry, metric: str) -> Iterator[str]:
    """Whether more pixels help."""
    known = [
        (one.cell.resolution, value)
        for one in standing.whole(task, best.encoder.name)
        if (value := value_of(one, metric)) is not None
    ]
    if len(known) < 2:
        return
    (low, first), (high, last) = known[0], known[-1]
    peak, top = max(known, key=lambda pair: pair[1])
    if top - min(value for _, value in known) < SAME:
        yield f"Resolution makes no difference ({low} to {high} px)."
    elif peak == high:
        yield f"It rises with resolution, from {first:.3f} at {low} px to {last:.3f} at {high} px."
    elif peak == low:
        yield f"It falls with resolution, from {first:.3f} at {low} px to {last:.3f} at {high} px."
    else:
        yield f"It peaks at {peak} px ({top:.3f}) and falls to {last:.3f} at {high} px."


def _sides(standing: Standing, task: str) -> tuple[Entry | None, list[Entry]]:
    """The best pretrained encoder of a task, and the floors."""
    entries = [one for one in standing.board[task] if one.score.mean is not None]
    trained = [one for one in entries if one.encoder.kind == "pretrained"]
    best = max(trained, key=lambda one: one.score.mean or 0.0) if trained else None
    return best, [one for one in entries if one.encoder.kind != "pretrained"]


def _beaten(standing: Standing, task: str, best: Entry, floors: list[Entry]) -> bool:
    found = [standing.comparison(task, best.encoder.name, floor.encoder.name) for floor in floors]
    return all(one and one[0].p_holm < LEVEL and one[1] * (one[0].difference.mean or 0.0) > 0 for one in found)


def _ends(entry: Entry) -> str:
    return "" if entry.score.low is None else f" [{entry.score.low:.3f}, {entry.score.high:.3f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
