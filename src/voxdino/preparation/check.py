"""Check a data set and take its facts in one parallel pass: every file is read once."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from voxdino.core.errors import DatasetError, GeometryError, ImageError, LabelError, SafetyError, VoxdinoError
from voxdino.core.io import image_suffix
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.volume import LabelMap, Volume
from voxdino.preparation.case import Case, Dataset
from voxdino.preparation.dataset import read_case
from voxdino.preparation.findings import CheckReport, Finding, Severity, gather_findings
from voxdino.preparation.fingerprint import (
    CaseFacts,
    Fingerprint,
    Samples,
    describe_case,
    medians_by_axis,
    pool_intensity,
    samples_per_case,
    summarise_extents,
)
from voxdino.preparation.splits import make_splits
from voxdino.preparation.workers import Fault, OverCases, file_bytes, run_over_cases

__all__ = ["CheckReport", "Finding", "Progress", "survey"]

Progress = Callable[[int, int], None]  # (cases done, cases in all)

_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_MOST_FOUND_IDS = 64  # more label values than that were not drawn by hand
_SET_ASIDE = "The case is set aside."

# kind of error, a word of its message -> row of the catalogue of faults
_CODES: tuple[tuple[type[VoxdinoError], str, str], ...] = (
    (GeometryError, "gap between", "B1"),
    (GeometryError, "unequal distances", "B2"),
    (GeometryError, "orientation varies", "B6"),
    (GeometryError, "PixelSpacing", "B12"),
    (ImageError, " series", "B4"),
    (ImageError, "cannot be decoded", "B9"),
    (GeometryError, "voxels, but", "A28"),
    (GeometryError, "affines", "A29"),
    (GeometryError, "EXIF", "C3"),
    (GeometryError, "", "A23"),
    (LabelError, "undeclared", "D2"),
    (LabelError, "", "D1"),
    (ImageError, "NaN", "A10"),
    (ImageError, "checksum", "A3"),
    (ImageError, "truncated", "A1"),
    (ImageError, "frames", "A13"),
    (ImageError, "", "A6"),
    (SafetyError, "", "A7"),
)


@dataclass(frozen=True)
class _Item:
    case: Case
    options: ReadOptions
    labels: LabelSet | None
    sources: dict[str, Path]
    num_samples: int


@dataclass(frozen=True)
class _Surveyed:
    facts: CaseFacts
    samples: Samples
    findings: tuple[Finding, ...]


def survey(
    dataset: Dataset,
    *,
    num_workers: int | None = None,
    over_cases: OverCases = run_over_cases,
    on_progress: Progress | None = None,
) -> tuple[CheckReport, Fingerprint]:
    """Read every labelled case once: what is wrong with it, and its facts.

    num_workers: processes; None: as many as there are processors, none for a small set.   over_cases: where they are.
    Cases with errors are in the report and not in the fingerprint. Errors: ResourceError when a worker dies.
    """
    findings = list(dataset.findings)
    items = []
    num_samples = samples_per_case(len(dataset.cases))
    for case in dataset.cases:
        sources = {dataset.name_of(path): path for path in case.files}
        if _is_lossy(case, dataset.options):
            findings.append(_lossy_labels(list(sources)[-1]))
        else:
            items.append(_Item(case, dataset.options, dataset.labels, sources, num_samples))
    names = [item.case.id for item in items]
    sizes = [file_bytes(item.case.files) for item in items]
    surveyed: dict[int, _Surveyed] = {}
    faults: dict[int, Fault] = {}
    with closing(over_cases(_survey_case, items, names, num_workers=num_workers, sizes=sizes)) as outcomes:
        for outcome in outcomes:
            if outcome.value is not None:
                surveyed[outcome.index] = outcome.value
            elif outcome.fault is not None:
                faults[outcome.index] = outcome.fault
            if on_progress is not None:
                on_progress(len(surveyed) + len(faults), len(items))
    findings += [_fault_finding(dataset, fault.error) for _, fault in sorted(faults.items())]
    results = [result for _, result in sorted(surveyed.items())]
    for result in results:
        findings += result.findings
    results, odd = _sort_out(dataset, results)
    findings += odd
    fingerprint = _fingerprint(dataset, results)
    findings += _judge_set(dataset, fingerprint)
    report = CheckReport(dataset=dataset.name, num_cases=len(dataset.cases), findings=gather_findings(findings))
    return report, fingerprint


def _survey_case(item: _Item) -> _Surveyed:
    volume, label = read_case(item.case, item.options, item.labels)
    facts, samples = describe_case(
        item.case.id, volume, label, item.sources, labels=item.labels, num_samples=item.num_samples
    )
    return _Surveyed(facts, samples, tuple(_look_at(list(item.sources), volume, label, facts)))


def _look_at(names: list[str], volume: Volume, label: LabelMap | None, facts: CaseFacts) -> Iterable[Finding]:
    """What is odd about a case that could be read."""
    for note in volume.notes:
        yield _finding("note", "A12", names[0], note, "It was read so.", "nothing to do if that is right.")
    for number, channel in enumerate(facts.intensity):
        if channel.sd == 0:
            fact = f"channel {number} is constant ({channel.mean:g} everywhere)."
            yield _finding("warning", "A11", names[0], fact, "Nothing can be learned from it.", "export it again.")
    if label is None:
        return
    for note in label.notes:
        yield _finding("note", "D1", names[-1], note, "It was read so.", "nothing to do if that is right.")
    if not facts.structures:
        fact = "holds no foreground voxel."
        yield _finding(
            "warning", "D5", names[-1], fact, "The case trains as background only.", "see whether it is meant."
        )


def _finding(severity: Severity, code: str, where: str, fact: str, consequence: str, fix: str) -> Finding:
    return Finding(severity=severity, code=code, where=where, fact=fact, consequence=consequence, fix=fix)


def _is_lossy(case: Case, options: ReadOptions) -> bool:
    return (
        options.lossy_threshold is None
        and case.label is not None
        and image_suffix(case.label).lower() in _LOSSY_SUFFIXES
    )


def _lossy_labels(name: str) -> Finding:
    return _finding(
        "error",
        "C6",
        name,
        "is a label map in JPEG, a lossy format: its values are no longer those that were drawn.",
        _SET_ASIDE,
        "store masks as PNG; or, for masks of one class, say --lossy-labels 127 (grey values above 127 are the class).",
    )


def _fault_finding(dataset: Dataset, error: VoxdinoError) -> Finding:
    where = error.where or dataset.name
    if Path(where).is_absolute():
        where = dataset.name_of(Path(where))
    code = next((code for kind, word, code in _CODES if isinstance(error, kind) and word in error.fact), "A6")
    if code == "D2" and "--map" in (error.fix or "") and "255 (" in error.fact:
        code = "C7"
    return _finding("error", code, where, error.fact, _SET_ASIDE, error.fix or "correct the file.")


def _sort_out(dataset: Dataset, results: list[_Surveyed]) -> tuple[list[_Surveyed], list[Finding]]:
    """Set aside the cases whose number of axes or channels is not that of the set."""
    if not results:
        return results, []
    kinds = Counter(result.facts.ndim for result in results)
    ndim = kinds.most_common(1)[0][0]
    counts = Counter(len(result.facts.intensity) for result in results if result.facts.ndim == ndim)
    declared = len(dataset.channels) or counts.most_common(1)[0][0]
    kept, findings = [], []
    for result in results:
        facts, channels = result.facts, len(result.facts.intensity)
        where = next(iter(facts.sources))
        if facts.ndim != ndim:
            fact = f"has {facts.ndim} axes, most images have {ndim}."
            findings.append(_finding("error", "A15", where, fact, _SET_ASIDE, "keep pictures and volumes apart."))
        elif channels != declared:
            fact = f"has {channels} channels, {'declared are' if dataset.channels else 'most images have'} {declared}."
            fix = "convert the image to the others' channels, or correct the channel names."
            findings.append(_finding("error", "C11", where, fact, _SET_ASIDE, fix))
        else:
            kept.append(result)
    return kept, findings


def _fingerprint(dataset: Dataset, results: list[_Surveyed]) -> Fingerprint:
    cases = [result.facts for result in results]
    labels = dataset.labels or _labels_found(cases)
    ids = [str(i) for _, i in labels.foreground] if labels else []
    structures = {}
    for name in ids:
        parts = [result.samples.extents[name] for result in results if name in result.samples.extents]
        number = sum(case.structures[name].num_components for case in cases if name in case.structures)
        structures[name] = summarise_extents(number, np.concatenate([np.empty(0, np.float32), *parts]))
    num_channels = len(cases[0].intensity) if cases else len(dataset.channels)
    has_foreground = any(case.foreground for case in cases)
    spacing = medians_by_axis(cases, [case.spacing for case in cases])
    *_, second, coarsest = (1.0, 1.0, *sorted(spacing.values()))
    return Fingerprint(
        dataset=dataset.name,
        layout=dataset.layout,
        channels=dataset.channels,
        num_channels=num_channels,
        labels=labels,
        read_options=dataset.options,
        cases=tuple(cases),
        median_shape=medians_by_axis(cases, [case.shape for case in cases]),
        median_spacing=spacing,
        anisotropy=coarsest / second if cases else None,
        structures=structures,
        foreground=tuple(
            pool_intensity(cases, [result.samples.intensities[channel] for result in results], channel)
            for channel in range(num_channels if has_foreground else 0)
        ),
    )


def _labels_found(cases: list[CaseFacts]) -> LabelSet | None:
    """The label set of the values in the files, each called by its number; None if there is nothing but background."""
    ids = sorted({int(value) for case in cases for value in case.num_voxels} - {0})
    if not ids or len(ids) > _MOST_FOUND_IDS:
        return None
    return LabelSet(names=("background", *(str(i) for i in ids)), ids=(0, *ids))


def _judge_set(dataset: Dataset, fingerprint: Fingerprint) -> Iterable[Finding]:
    """What only shows when all cases are seen together."""
    yield from _judge_labels(dataset, fingerprint)
    yield from _judge_duplicates(dataset, fingerprint)
    if fingerprint.cases:
        unusable = {case.id for case in dataset.cases} - {case.id for case in fingerprint.cases}
        yield from _judge_splits(dataset.without(unusable))


def _judge_splits(dataset: Dataset) -> Iterable[Finding]:
    """An error where no folds can be made of the usable cases; a warning where a setting makes it possible."""
    try:
        make_splits(dataset)
    except DatasetError as error:
        fact, fix = error.fact, error.fix or ""
        try:
            make_splits(dataset, num_folds=2)
        except DatasetError:
            yield _finding("error", "D18", dataset.name, fact, "No folds can be made.", fix)
        else:
            yield _finding("warning", "D18", dataset.name, fact, "Preparing stops there.", fix)


def _judge_labels(dataset: Dataset, fingerprint: Fingerprint) -> Iterable[Finding]:
    cases, nothing = fingerprint.cases, "There is nothing to learn."
    found = {int(value) for case in cases for value in case.num_voxels}
    if not cases:
        return
    if dataset.labels is None and found == {0, 255}:
        fix = "say --map 255=1, or name the id 255 in labels.json."
        fact = "the masks hold 0 and 255, not 0 and 1."
        yield _finding("error", "C7", dataset.name, fact, "What 255 means is not known.", fix)
    elif dataset.labels is None and len(found) > _MOST_FOUND_IDS:
        fact = f"the label files hold {len(found)} different values."
        fix = "store masks without smoothing or compression, or name the classes in labels.json."
        yield _finding("error", "D2", dataset.name, fact, "They are no label maps drawn by hand.", fix)
    elif fingerprint.labels is None or not any(case.structures for case in cases):
        fix = "see whether the right label files were exported."
        yield _finding("error", "D5", dataset.name, "no label file holds a foreground voxel.", nothing, fix)
    else:
        for name, value in fingerprint.labels.foreground:
            if value not in found:
                fact = f"class '{name}' (id {value}) is in no label file."
                fix = "correct the labels, or add cases that show it."
                yield _finding("warning", "D5", dataset.name, fact, "Its score will be undefined.", fix)


def _judge_duplicates(dataset: Dataset, fingerprint: Fingerprint) -> Iterable[Finding]:
    """The same image under two names: a leak when the two stand on different sides of a split."""
    by_content: dict[tuple[str, ...], list[CaseFacts]] = {}
    num_images = {case.id: len(case.images) for case in dataset.cases}
    for facts in fingerprint.cases:
        by_content.setdefault(tuple(facts.sources.values())[: num_images[facts.id]], []).append(facts)
    group_of = {case.id: case.group for case in dataset.cases}
    for same in by_content.values():
        for first, second in pairwise(same):
            if dataset.splits is not None:
                torn = any((first.id in split.train) != (second.id in split.train) for split in dataset.splits)
            else:
                torn = group_of[first.id] is None or group_of[first.id] != group_of[second.id]
            fact = f"is the same image as {next(iter(first.sources))}."
            consequence = "It can stand in training and in validation at once." if torn else "It counts twice."
            yield _finding(
                "warning", "D15", next(iter(second.sources)), fact, consequence, "remove one, or put both in one group."
            )
