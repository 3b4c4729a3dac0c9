"""Fewer draws than in earnest: seconds, not minutes."""

import pytest

from voxdino.benchmark import compare
from voxdino.evaluation import cohort


@pytest.fixture(scope="module")
def few_draws():
    """Bootstrap and exchange tests of 200 draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "NUM_PERMUTATIONS", 199)
        patch.setattr(cohort, "NUM_RESAMPLES", 200)
        _forget()
        yield
    _forget()


def _forget():
    compare._exchanges.cache_clear()
    cohort.resamples.cache_clear()
