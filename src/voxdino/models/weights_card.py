"""What is known of a backbone's weights: where they come from, their licence, what they have seen."""

import base64
from bisect import bisect_left
from collections.abc import Iterable

from voxdino.core.records import Record
from voxdino.models.backbones.build import BackboneConfig
from voxdino.models.foreign import ImportedModel


class PretrainingFacts(Record):
    """Where weights of our own pretraining come from.

    start:    the weights it started from, by name; teachers: those it learned to see as.
    sources:  images by source: {"name": {"cases": 200, "slices": 7100}}; those of start and teachers too.
    seen:     of every file that was in the pool, or in one of theirs, the first 6 bytes of its SHA-256, sorted and
              joined, in base64: enough to tell a test case that was trained on, and nothing about it else.
    """

    recipe: str
    start: str
    teachers: tuple[str, ...] = ()
    num_steps: int
    pool_digest: str
    sources: dict[str, dict[str, int]]
    seen: str

    def holds(self, digest: str) -> bool:
        """Whether the file with this SHA-256 (hexadecimal) was in the pool."""
        joined, wanted = base64.b64decode(self.seen), bytes.fromhex(digest[:12])
        place = bisect_left(range(len(joined) // 6), wanted, key=lambda row: joined[6 * row : 6 * row + 6])
        return joined[6 * place : 6 * place + 6] == wanted


def pack_seen(digests: Iterable[str], earlier: Iterable[str] = ()) -> str:
    """`PretrainingFacts.seen` of SHA-256 digests, and of what earlier pretrainings have seen."""
    rows = {bytes.fromhex(digest[:12]) for digest in digests}
    for packed in earlier:
        joined = base64.b64decode(packed)
        rows |= {joined[place : place + 6] for place in range(0, len(joined), 6)}
    return base64.b64encode(b"".join(sorted(rows))).decode()


class WeightsCard(Record):
    """What is known of a backbone's weights; `<name>.json` beside `<name>.safetensors`, and part of every model.

    licence:       inherited by everything trained from the weights.
    source:        the file's name or the repository it came from; never a path of somebody's machine.
    file_digest:   SHA-256 of the file the weights are in now; source_digest: of the file they came from.
    licence_shown: the licence was printed once already.
    model:         where the file holds a whole model of other authors: what it is. The rest is about its backbone.
    pretraining:   of weights that voxdino itself pretrained.
    """

    name: str
    layout: str
    licence: str
    source: str
    file_digest: str
    source_digest: str
    config: BackboneConfig
    num_parameters: int
    notes: tuple[str, ...] = ()
    model: ImportedModel | None = None
    pretraining: PretrainingFacts | None = None
    licence_shown: bool = False
    format_version: int = 1
