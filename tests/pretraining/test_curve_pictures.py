"""Drawing the curves never takes more than its share of a run."""

from voxdino.pretraining.curves import DRAW_SHARE, pause_after


def test_drawing_waits_the_longer_the_longer_it_takes():
    assert pause_after(0.0) == pause_after(0.1) == 30.0
    for took_s in (2.0, 60.0):
        assert took_s <= DRAW_SHARE * pause_after(took_s)
