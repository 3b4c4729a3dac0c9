"""Scores of single cases, kept by a shard for the call that brings all of them together."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import voxdino
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json, digest_path
from voxdino.evaluation.measure import Measures
from voxdino.evaluation.scores import StructureScores
from voxdino.evaluation.summarise import ScoredCase

Pair = tuple[str, Path, Path]  # case id, prediction, reference


class KeptCase(Record):
    """The scores of a case. files: digests of the prediction and the reference."""

    files: tuple[str, str]
    rows: tuple[StructureScores, ...]
    length_unit: str
    volume_unit: str


class KeptScores(Record):
    """scores.1of8.json. how: digest of everything that the scores depend on beside the files."""

    how: str
    cases: dict[str, KeptCase]


def way_to_score(labels: LabelSet, options: ReadOptions, measures: Measures) -> str:
    """`KeptScores.how`."""
    return digest_json([voxdino.__version__, labels.to_json(), options.to_json(), asdict(measures)])


def keep(path: Path, how: str, pairs: Sequence[Pair], scored: Iterable[ScoredCase]) -> None:
    files = {case: (digest_path(prediction), digest_path(reference)) for case, prediction, reference in pairs}
    cases = {
        one.rows[0].case: KeptCase(
            files=files[one.rows[0].case], rows=one.rows, length_unit=one.length_unit, volume_unit=one.volume_unit
        )
        for one in scored
    }
    KeptScores(how=how, cases=cases).write(path)


def take(paths: Iterable[Path], how: str, pairs: Sequence[Pair]) -> dict[str, ScoredCase]:
    """Of the pairs those that were scored in the same way from the files as they are now. Errors: ConfigError."""
    found: dict[str, KeptCase] = {}
    for path in paths:
        kept = KeptScores.read(path)
        found |= kept.cases if kept.how == how else {}
    return {
        case: ScoredCase(found[case].rows, found[case].length_unit, found[case].volume_unit)
        for case, prediction, reference in pairs
        if case in found and found[case].files == (digest_path(prediction), digest_path(reference))
    }
