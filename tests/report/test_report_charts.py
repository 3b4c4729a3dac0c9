"""Laws of axes, and charts whose numbers one can check by hand."""

import re

import pytest

from voxdino.report.axes import Axis, axis_of, round_step
from voxdino.report.charts import draw_agreement, draw_curves, draw_forest, draw_ranks
from voxdino.report.page import (
    AgreementSection,
    CurveSection,
    ForestSection,
    Interval,
    Point,
    RankSection,
    Series,
)
from voxdino.report.texts import number

WIDTHS = (330.0, 880.0)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3e-4, 2e-4), (0.891, 0.9), (17.0, 123456.0), (-5.0, -4.999)])
@pytest.mark.parametrize("is_log", [False, True])
def test_ticks_are_round_distinct_and_on_the_axis(low, high, is_log):
    if is_log and low <= 0:
        low, high = 1e-3, 20.0
    axis = Axis(low, high, 50.0, 400.0, is_log)
    ticks = axis.ticks(64)
    assert len(ticks) <= 7
    assert len({label for _, label in ticks}) == len(ticks) >= (0 if is_log else 2)
    for value, label in ticks:
        assert 50 - 1e-6 <= axis.place(value) <= 400 + 1e-6
        assert float(label.replace("−", "-").replace(" ", "")) == pytest.approx(value, rel=1e-6, abs=1e-12)


def test_an_axis_holds_its_values_even_a_single_one():
    for values in ([3.0], [0.0, 0.0], [-2.0, 5.0]):
        axis = axis_of(values, 10, 110)
        assert all(10 < axis.place(value) < 110 for value in values)
    log = axis_of([64.0, 224.0], 10, 110, is_log=True)
    assert 10 < log.place(64) < log.place(224) < 110


@pytest.mark.parametrize("size, step", [(0.9, 1.0), (1.0, 1.0), (1.1, 2.0), (0.023, 0.05), (600.0, 1000.0)])
def test_steps_are_1_2_5(size, step):
    assert round_step(size) == pytest.approx(step)


@pytest.mark.parametrize(
    "value, words", [(0.91234, "0.912"), (1482.4, "1482"), (-0.5, "−0.500"), (0.0, "0"), (3.2e-7, "3.20e−7")]
)
def test_numbers_have_three_significant_digits(value, words):
    assert number(value).replace("e−07", "e−7") == words


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("width", WIDTHS)
def test_agreement_shows_bias_and_limits_by_hand(width):
    points = (("a", 10.0, 11.0), ("b", 20.0, 19.0), ("c", 30.0, 33.0))  # differences 1, -1, 3: mean 1, SD 2
    shown = texts(draw_agreement(AgreementSection(title="t", unit="ml", points=points), width))
    assert {"1.00", "4.92", "−2.92"} <= set(shown)


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_join_the_ranks_that_lie_within_the_critical_difference(width):
    section = RankSection(
        title="t", names=tuple("abcde"), mean_ranks=(1.0, 1.6, 2.9, 3.5, 5.0), critical_difference=0.7
    )
    svg = draw_ranks(section, width)
    assert svg.count('class="joined"') == 2  # a b, c d
    lonely = section.model_copy(update={"critical_difference": 0.3})
    assert 'class="joined"' not in draw_ranks(lonely, width)
    everybody = section.model_copy(update={"critical_difference": 4.0})
    assert draw_ranks(everybody, width).count('class="joined"') == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_a_forest_has_its_numbers_and_says_what_is_undefined(width):
    rows = (("liver", Interval(mean=0.9, low=0.85, high=0.93)), ("spleen", Interval(mean=None, low=None, high=None)))
    shown = texts(draw_forest(ForestSection(title="t", axis_label="Dice", rows=rows), width))
    assert "0.900 [0.850, 0.930]" in shown and "undefined" in shown


def test_measured_places_label_a_logarithmic_axis():
    points = tuple(Point(x=x, y=0.5) for x in (64, 112, 224))
    section = CurveSection(
        title="t", x_label="px", y_label="AUC", x_is_log=True, series=(Series(name="a", points=points),)
    )
    assert {"64.0", "112", "224"} <= set(texts(draw_curves(section, 880.0)))
