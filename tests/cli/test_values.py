"""What the words of the options mean."""

import pytest

from voxdino.cli.options import NanPolicy
from voxdino.cli.values import (
    finetune_settings,
    parse_label_map,
    parse_settings,
    parse_time_budget,
    plan_settings,
    read_options,
    run_folder_of,
    split_settings,
)
from voxdino.core.errors import UsageError
from voxdino.core.io.options import ReadOptions


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 90), ("45s", 45), ("10m", 600), ("1h30m", 5400), ("2h", 7200), ("1h1m1s", 3661), ("1m30", 90)],
)
def test_a_time_budget_is_read_as_people_write_it(text, seconds):
    assert parse_time_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "-5m", "10 minutes", "1.5h", "m", "30m1h"])
def test_anything_else_is_no_length_of_time(text):
    with pytest.raises(UsageError, match="no length of time"):
        parse_time_budget(text)


def test_no_time_budget_is_none():
    assert parse_time_budget(None) is None


def test_settings_go_to_the_plan_or_to_the_training():
    items = ["plan.crop=[64,48]", "decoder=linear", "augment.noise=0.5", "backbone=a=b"]
    assert split_settings(items) == (
        {"crop": "[64,48]"},
        {"decoder": "linear", "augment.noise": "0.5", "backbone": "a=b"},
    )
    assert plan_settings(["plan.seed=3"]) == {"seed": "3"}
    assert plan_settings(None, seed=7) == {"seed": "7"} and plan_settings(["plan.seed=3"], seed=7) == {"seed": "3"}
    assert finetune_settings(["seed=3"]) == {"seed": "3"}


@pytest.mark.parametrize("items, words", [(["crop"], "KEY=VALUE"), (["=3"], "KEY=VALUE"), (["a=1", "a=2"], "twice")])
def test_settings_that_are_none_are_refused(items, words):
    with pytest.raises(UsageError, match=words):
        parse_settings(items)


def test_a_setting_of_the_other_command_is_refused_with_the_way_to_give_it():
    with pytest.raises(UsageError) as caught:
        plan_settings(["decoder=linear"])
    assert "plan.KEY=VALUE" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        finetune_settings(["plan.crop=[1,2]"])
    assert "voxdino prepare" in str(caught.value)


def test_labels_are_mapped_by_pairs_of_ids():
    assert parse_label_map(["255=1", " 7 = 2 "]) == ((255, 1), (7, 2))
    assert parse_label_map(None) == ()


@pytest.mark.parametrize("items", [["255"], ["a=1"], ["-1=1"], ["1=1.5"], ["255=1", "255=2"]])
def test_maps_that_are_none_are_refused(items):
    with pytest.raises(UsageError, match="--map"):
        parse_label_map(items)


def test_reading_options_say_what_was_allowed():
    assert read_options() == ReadOptions()
    found = read_options(label_map=["255=1"], lossy_labels=127, nan_policy=NanPolicy.fill, geometry_tol=0.5)
    assert found == ReadOptions(label_map=((255, 1),), lossy_threshold=127, nan_policy="fill", geometry_tolerance=0.5)


def test_a_run_has_a_folder_of_its_own_inside_the_workdir(tmp_path):
    assert run_folder_of(tmp_path, None, "segdino_v2", 3) == tmp_path / "runs" / "segdino_v2_fold3"
    for name in ("../out", "a/b", ".hidden", ""):
        if name:
            with pytest.raises(UsageError, match="no name for a run"):
                run_folder_of(tmp_path, name, "segdino_v2", 0)
