"""Scores of single cases, kept by a shard for the call that brings all of them together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import voxdino
from voxdino.core.io import digest_image
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.safe_files import digest_json
from voxdino.evaluation.measure import Measures
from voxdino.evaluation.scores import StructureScores
from voxdino.evaluation.summarise import ScoredCase

Pair = tuple[str, Path, Path]  # case id, prediction, reference
Digests = Mapping[str, tuple[str, str]]  # by case id: of the prediction and of the reference


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


def digest_pairs(pairs: Sequence[Pair]) -> Digests:
    """Before they are scored: what changes meanwhile is scored again. A pair that cannot be read is left out."""
    digests = {}
    for case, prediction, reference in pairs:
        with suppress(OSError):
            digests[case] = digest_image(prediction), digest_image(reference)
    return digests


def keep(path: Path, how: str, digests: Digests, scored: Iterable[ScoredCase]) -> None:
    cases = {
        one.rows[0].case: KeptCase(
            files=digests[one.rows[0].case], rows=one.rows, length_unit=one.length_unit, volume_unit=one.volume_unit
        )
        for one in scored
        if one.rows[0].case in digests
    }
    KeptScores(how=how, cases=cases).write(path)


def take(paths: Iterable[Path], how: str, digests: Digests, on_used: Callable[[Path], None]) -> dict[str, ScoredCase]:
    """Those that were scored in the same way from the files as they are now. Errors: ConfigError.

    on_used: told of each file of `paths` with scores of this way; others are for a call that scores in their way.
    """
    found: dict[str, KeptCase] = {}
    for path in paths:
        kept = KeptScores.read(path)
        if kept.how == how:
            found |= kept.cases
            on_used(path)
    return {
        case: ScoredCase(found[case].rows, found[case].length_unit, found[case].volume_unit)
        for case, files in digests.items()
        if case in found and found[case].files == files
    }
