"""Laws of `evaluate --shard`: parts and the whole exclude each other, and only scores that were taken go away."""

import pytest

from voxdino.cli import main
from voxdino.core.locks import lock_folder
from voxdino.evaluation.scores import Scores
from voxdino.preparation.phantoms import draw_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return draw_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=2, seed=4)


@pytest.fixture
def evaluate(phantoms, tmp_path):
    folders = [str(phantoms / "labelsTr"), str(phantoms), "--out", str(tmp_path / "s.json"), "--workers", "1"]
    return lambda *options: main(["evaluate", *folders, *options])


def test_a_plain_call_takes_away_only_the_scores_that_it_took(evaluate, tmp_path):
    parts = [tmp_path / f"s.{number}of2.json" for number in (1, 2)]
    assert evaluate("--shard", "1/2", "--metrics", "dice") == evaluate("--shard", "2/2", "--metrics", "iou") == 0
    assert evaluate("--metrics", "iou") == 0
    assert [part.exists() for part in parts] == [True, False] and set(Scores.read(tmp_path / "s.json").rules) == {"iou"}
    assert evaluate("--metrics", "dice") == 0 and not parts[0].exists()


def test_shards_and_a_plain_call_exclude_each_other_and_other_files_do_not_matter(evaluate, tmp_path, capsys):
    with lock_folder(tmp_path, file="s.json", part="2of2"):  # another shard is at work
        assert evaluate("--metrics", "dice", "--shard", "1/2") == 0
        before = (tmp_path / "s.1of2.json").read_bytes()
        assert evaluate("--metrics", "dice") == 4 and "another run works" in capsys.readouterr().err
        assert (tmp_path / "s.1of2.json").read_bytes() == before and not (tmp_path / "s.json").exists()
    with lock_folder(tmp_path, file="s.json"):
        assert evaluate("--metrics", "dice", "--shard", "1/2") == 4
    with lock_folder(tmp_path, file="other.json"):
        assert evaluate("--metrics", "dice") == 0
