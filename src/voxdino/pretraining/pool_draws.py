"""Which slice a draw takes: fair to weights, without replacement, from the seed and the number of the draw alone."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate

_FEWEST_SLOTS = 20  # of a source per round, so that rounding does not change its weight
_ROUNDS = 6  # of the network that shuffles


class Deck:
    """Draws from sources of different sizes and weights: numbers only, so that it takes no memory.

    In a round, source s has num_slices x weight slots (weights against the largest), and the slots of all sources are
    shuffled. Its slots are filled with its own slices in shuffled order, lap after lap, across rounds.
    """

    def __init__(self, sources: Sequence[tuple[int, float]]) -> None:
        """sources: (slices, weight) of each; one at least has slices."""
        self._sizes = [size for size, _ in sources]
        self._first = [0, *accumulate(self._sizes)]
        largest = max(weight for size, weight in sources if size)
        shares = [size * weight / largest for size, weight in sources]
        fewest = min(share for share in shares if share)
        laps = 1 if all(share == round(share) for share in shares) else max(1, math.ceil(_FEWEST_SLOTS / fewest))
        self._slots = [round(share * laps) for share in shares]
        self._edges = [0, *accumulate(self._slots)]

    def draw(self, number: int, seed: int) -> int:
        lap, place = divmod(number, self._edges[-1])
        slot = shuffled(place, self._edges[-1], f"{seed} round {lap}")
        source = bisect_right(self._edges, slot) - 1
        size = self._sizes[source]
        lap, place = divmod(lap * self._slots[source] + slot - self._edges[source], size)
        return self._first[source] + shuffled(place, size, f"{seed} source {source} {lap}")


def shuffled(place: int, size: int, key: str) -> int:
    """Where `place` of range(size) goes in a random order that `key` names: a Feistel network, walked until inside."""
    bits = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(_ROUNDS):
            mixed = blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & mask
        place = left << bits | right
        if place < size:
            return place
