"""Cells of segmentation tasks: frozen encoders under a linear layer or a light decoder, on the original grids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import Cell, TaskEntry
from voxdino.benchmark.result import CellResult
from voxdino.core.errors import DatasetError, InputError, UsageError, without_folders
from voxdino.core.labels import LabelSet
from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json, write_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.data.corruptions import corrupted
from voxdino.data.store import CaseStore
from voxdino.evaluation.measure import Measures, score_label_maps
from voxdino.evaluation.statistics import owners_of
from voxdino.preparation.case import Case, Dataset, Split
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_case, read_dataset
from voxdino.preparation.made_record import source_digest
from voxdino.preparation.memory import BackboneFacts, BackboneProbe
from voxdino.preparation.plan import Plan, make_plan
from voxdino.preparation.prepare import prepare
from voxdino.preparation.splits import make_splits
from voxdino.probes.fitting import spread

METRICS = ("dice", "nsd", "hd95")
NUM_PARTS = 5  # one of them chooses
BATCH_SIZE = "8"  # of decoders, in slices
SET = "set.json"
SET_FORMAT = 2  # raised when the meaning of a prepared set changes


class SetRecord(Record):
    """set.json of a prepared set: written last. failed: cases that could not be used, with the reason."""

    cases: tuple[str, ...]
    failed: dict[str, str]


@dataclass(frozen=True, eq=False)
class Model:
    """What a probe gives: a model to predict with.

    predict(case, volume, keep): a label map in file ids; keep: what was computed of the case may serve again.
    validation: Dice on cases that neither train nor test.
    """

    predict: Callable[[str, Volume, bool], LabelMap]
    validation: float | None
    num_train: int
    settings: Mapping[str, float | int | str | None]


Fit = Callable[["SegmentationData", Cell, Encoder], Model]


@dataclass(frozen=True, eq=False)
class SegmentationData:
    """A data set prepared for tokens of one size. folder: a workdir as `voxdino prepare` makes it.

    splits: one, or one for each site: training cases, those to choose with, and test cases.
    """

    entry: TaskEntry
    dataset: Dataset
    plan: Plan
    folder: Path
    failed: Mapping[str, str]
    sites: tuple[str | None, ...]
    splits: tuple[tuple[Split, tuple[str, ...]], ...]
    device: torch.device

    @classmethod
    def open(
        cls, entry: TaskEntry, root: Path, folder: Path, encoder: Encoder, device: torch.device
    ) -> "SegmentationData":
        """Check, plan and prepare the data set, or take what an earlier call has prepared.

        Errors: those of the data set; UsageError where groups are to be held out and there are none.
        """
        dataset = read_dataset(root / entry.data, entry.read_options)
        sites, held_back = _held_back(entry, dataset)
        if entry.limit is not None:
            dataset, held_back = _limited(dataset, held_back, entry.limit)
        options = [entry.data, encoder.patch_size, entry.read_options.to_json(), [sorted(test) for test in held_back]]
        place = folder / "sets" / digest_json([SET_FORMAT, *options, _content(dataset)])[:20]
        if not (place / SET).is_file():
            _prepare(dataset, place, encoder)
        record = SetRecord.read(place / SET)
        dataset = dataset.without({case.id for case in dataset.cases} - set(record.cases))
        splits = tuple(_inner(dataset, test & set(record.cases)) for test in held_back)
        write_json(place / "splits.json", [split.to_json() for split, _ in splits])
        return cls(entry, dataset, Plan.read(place / "plan.json"), place, record.failed, sites, splits, device)

    @cached_property
    def store(self) -> CaseStore:
        return CaseStore(self.folder / "prepared")

    @cached_property
    def digest(self) -> str:
        """Of the images, the labels, and how they were prepared."""
        sources = {case: self.store.record(case).source_digests for case in self.store.ids}
        return digest_json([self.plan.preparation_digest(), sources])

    def split(self, site: str | None) -> tuple[Split, tuple[str, ...]]:
        return self.splits[self.sites.index(site)]

    def ids(self, site: str | None) -> list[list[str]]:
        """Of the cases that train, that choose, and that test."""
        split, test = self.split(site)
        return [list(split.train), list(split.val), list(test)]

    def classes(self, probe: str) -> LabelSet:
        """The labels of a probe that gives every voxel one class. Errors: UsageError for overlapping regions."""
        if self.plan.labels.regions:
            fix = "take the probe decoder_2d, or a data set whose labels are classes."
            raise UsageError(f"{probe} takes no overlapping regions.", where=self.dataset.root, fix=fix)
        return self.plan.labels

    def magnification(self, encoder: Encoder, resolution: int) -> float:
        """Network pixels per prepared voxel that make the longer side of a crop `resolution` long."""
        return round(encoder.side(resolution) / max(self.plan.crop), 4)

    def fit(self, cell: Cell, encoder: Encoder, fit: Fit) -> Model:
        return fit(self, cell, encoder)

    def measure(self, cell: Cell, encoder: Encoder, model: Model) -> CellResult:
        """Predict the test cases, score them."""
        test = self.split(cell.site)[1]
        cases = {case.id: case for case in self.dataset.cases}
        scores: dict[str, list[float | None]] = {metric: [] for metric in METRICS}
        done, failed = list[str](), dict[str, str]()
        for name in test:
            try:
                values = self.score(cases[name], model.predict, cell)
            except InputError as error:
                failed[name] = without_folders(error, {file.parent: "" for file in cases[name].files})
                continue
            done.append(name)
            for metric in METRICS:
                scores[metric].append(values[metric])
        if not done:
            raise DatasetError(f"no test case could be scored: {'; '.join(failed.values())}", where=self.dataset.root)
        named = {name: case.group for name, case in cases.items() if case.group is not None}
        return CellResult(
            cell=cell,
            cases=tuple(done),
            groups=owners_of(done, named) if named else None,
            scores={metric: tuple(values) for metric, values in scores.items()},
            validation=None if cell.shots is not None else model.validation,
            num_train=model.num_train,
            settings=dict(model.settings),
            failed=failed,
            leaked=self._leaked(test, encoder),
        )

    def score(
        self, case: Case, predict: Callable[[str, Volume, bool], LabelMap], cell: Cell
    ) -> dict[str, float | None]:
        """Each metric, averaged over the structures where it is defined."""
        known = self.store.record(case.id).source_digests
        for file in case.files:
            if known.get(self.dataset.name_of(file)) != source_digest(file):
                fix = "run the same command again: it prepares anew what has changed."
                raise DatasetError("was changed since it was prepared.", where=file, fix=fix)
        labels = self.plan.labels
        volume, reference = read_case(case, self.plan.read_options, labels)
        assert reference is not None
        if cell.corruption is not None:
            volume = replace(volume, array=corrupted(volume.array, cell.corruption, cell.strength, of=case.id))
        predicted = predict(case.id, volume, cell.corruption is None)
        rows = score_label_maps(
            labels.to_indices(predicted.array),
            labels.to_indices(reference.array),
            reference.grid,
            labels,
            case=case.id,
            measures=Measures(metrics=METRICS),
        )
        means: dict[str, float | None] = {}
        for metric in METRICS:
            defined = [value for row in rows if (value := row.values[metric]) is not None]
            means[metric] = round(float(np.mean(defined)), 7) if defined else None
        return means

    def _leaked(self, test: tuple[str, ...], encoder: Encoder) -> tuple[str, ...]:
        if encoder.card.pretraining is None:
            return ()
        holds = encoder.card.pretraining.holds
        return tuple(name for name in test if any(map(holds, self.store.record(name).source_digests.values())))


def _content(dataset: Dataset) -> list[object]:
    """Of each case its id, its group, and the files as they are now: one that changes makes another prepared set."""
    cases = [
        [case.id, case.group, {dataset.name_of(file): _digest(file) for file in case.files}] for case in dataset.cases
    ]
    return [dataset.channels, dataset.labels and dataset.labels.to_json(), *cases]


def _digest(file: Path) -> str | None:
    """None of a file that cannot be read: checking the data set names it."""
    try:
        return source_digest(file)
    except DatasetError:
        return None


def _held_back(entry: TaskEntry, dataset: Dataset) -> tuple[tuple[str | None, ...], tuple[set[str], ...]]:
    """Sites (or None for the data set's split) and their test cases."""
    if entry.hold_out == "split":
        splits = make_splits(dataset)
        if entry.fold >= len(splits):
            fact = f"there is no fold {entry.fold}; the data set has {len(splits)}."
            raise UsageError(fact, where=dataset.root, fix=f"choose one from 0 to {len(splits) - 1}.")
        return (None,), (set(splits[entry.fold].val),)
    groups: dict[str, set[str]] = {}
    for case in dataset.cases:
        if case.group is not None:
            groups.setdefault(case.group, set()).add(case.id)
    if len(groups) < 2:
        fix = "name the site of each case (column 'group'), or take hold_out split."
        raise UsageError("fewer than two groups are named, so none can be held out.", where=dataset.root, fix=fix)
    return tuple(sorted(groups)), tuple(groups[name] for name in sorted(groups))


def _limited(dataset: Dataset, held_back: tuple[set[str], ...], limit: int) -> tuple[Dataset, tuple[set[str], ...]]:
    """At most `limit` test cases of each split, and `limit` of all others."""
    tests = tuple({sorted(test)[place] for place in spread(len(test), limit)} for test in held_back)
    others = sorted({case.id for case in dataset.cases} - set().union(*held_back))
    chosen = set().union(*tests, (others[place] for place in spread(len(others), limit)))
    return dataset.without({case.id for case in dataset.cases} - chosen), tests


def _inner(dataset: Dataset, test: set[str]) -> tuple[Split, tuple[str, ...]]:
    """A fifth of the training cases (of very few: one) chooses; groups stay whole."""
    rest = replace(dataset.without(test), splits=None)
    num_groups = len({case.group or (case.id,) for case in rest.cases})
    return make_splits(rest, min(NUM_PARTS, num_groups))[0], tuple(sorted(test))


class _Known(BackboneProbe):
    """A probe of an encoder that is loaded here already: no child process has to look at it."""

    def __init__(self, encoder: Encoder) -> None:
        self._facts = BackboneFacts(encoder.name, encoder.patch_size, encoder.card.num_parameters, "cpu")


def _prepare(dataset: Dataset, place: Path, encoder: Encoder) -> None:
    """Everything `voxdino prepare` does, into `place`; a case that cannot be read is left out and named."""
    report, fingerprint = survey(dataset)
    usable = {case.id for case in fingerprint.cases}
    failed = {name: f"{error.fact} {error.fix}" for error in report.errors for name in (error.where, *error.others)}
    dataset = dataset.without({case.id for case in dataset.cases} - usable)
    plan = make_plan(fingerprint, dataset, memory=_Known(encoder), settings={"batch_size": BATCH_SIZE})
    with lock_folder(place):
        fingerprint.write(place / "fingerprint.json")
        plan.write(place / "plan.json")
    prepare(dataset, plan, place)
    SetRecord(cases=tuple(case.id for case in dataset.cases), failed=failed).write(place / SET)
