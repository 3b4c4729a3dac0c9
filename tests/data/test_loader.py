"""Reading ahead: the same items in order for any number of threads, errors passed on, no more held than asked."""

import threading
import time

import pytest

from voxdino.core.errors import ImageError, ResourceError
from voxdino.data.loader import ReadAhead


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_items_come_in_order_whatever_the_threads(num_threads):
    def fetch(step):
        time.sleep(0.002 * (step % 3))  # later ones may be ready first
        return step * step

    with ReadAhead(fetch, first=3, num_threads=num_threads) as items:
        assert [next(items) for _ in range(20)] == [step * step for step in range(3, 23)]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_the_error_of_an_item_reaches_the_consumer_as_it_is(num_threads):
    def fetch(step):
        if step == 2:
            raise ImageError("a chunk does not decompress", where="case_07.image.b2nd")
        return step

    with ReadAhead(fetch, num_threads=num_threads) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(ImageError, match="case_07"):
            next(items)


def test_no_more_than_depth_items_are_read_ahead():
    started = []
    with ReadAhead(lambda step: started.append(step), num_threads=2, depth=3) as items:
        next(items)
        time.sleep(0.05)
        assert len(started) == 3


@pytest.mark.parametrize("num_bytes, most", [(4, 5), (10, 3), (20, 1), (99, 1)])
def test_no_more_bytes_are_held_than_allowed_but_for_the_item_asked_for(num_bytes, most):
    started = []

    def fetch(step):
        started.append(step)
        return step

    settings = {"num_threads": 2, "depth": 5, "size_of": lambda item: num_bytes, "max_bytes": 30}
    with ReadAhead(fetch, **settings) as items:
        for number in range(4):
            assert next(items) == number
            time.sleep(0.05)
            assert len(started) == number + most


def test_a_hanging_drive_is_noticed():
    release = threading.Event()
    with ReadAhead(lambda step: release.wait(5), num_threads=1, hang_s=0.05) as items:
        with pytest.raises(ResourceError, match=r"within 0\.05 s"):
            next(items)
        release.set()
