"""A data set in memory: its cases, channels, labels and given splits, whatever layout they came in."""

import os
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.preparation.findings import Finding

Layout = Literal["nnunet", "msd", "folder", "pairs"]
SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Case:
    """One examination: its image files and its label file.

    images: one file per channel, or one file that holds all channels; a DICOM scan may be a folder.
    group:  cases of one group (patient, site) never stand on both sides of a split; None: the case is its own group.
    split:  side the data set puts the case on, if it says so.
    frames_as_channels: the layout keeps several channels as the frames of one 4-D file (MSD).
    series: of a DICOM folder, archive or file that holds several (see ReadOptions); None: as the options say.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str | None = None
    split: SplitName | None = None
    frames_as_channels: bool = False
    series: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.images if self.label is None else (*self.images, self.label)


class Split(Record):
    """One fold: the ids of the cases to train on and of those held back."""

    train: tuple[str, ...]
    val: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """A data set as its files describe it.

    channels:   names, in file order ("CT", "T1", "red"); () where the layout does not say (folder + CSV).
    labels:     what the numbers mean; None where the layout does not say: the survey then finds the ids, see
                `Fingerprint.labels`.
    cases:      labelled cases, for training and validation, sorted by id.
    test_cases: the others; they may have labels.
    splits:     the splits that come with the data set, or None.
    findings:   what reading the description brought up.
    """

    root: Path
    name: str
    layout: Layout
    channels: tuple[str, ...]
    labels: LabelSet | None
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...]
    splits: tuple[Split, ...] | None
    options: ReadOptions
    findings: tuple[Finding, ...] = ()

    def name_of(self, path: Path) -> str:
        """A file's name in records: relative to the root, never absolute."""
        return Path(os.path.relpath(path, self.root)).as_posix()

    def without(self, ids: Container[str]) -> "Dataset":
        """The data set without some labelled cases, also in its splits."""
        splits = self.splits and tuple(
            Split(train=tuple(i for i in fold.train if i not in ids), val=tuple(i for i in fold.val if i not in ids))
            for fold in self.splits
        )
        return replace(self, cases=tuple(case for case in self.cases if case.id not in ids), splits=splits)
