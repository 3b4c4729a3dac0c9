"""A plan is kept while it is what was asked for, and never replaced without a word."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from voxdino.cli import steps
from voxdino.core.errors import ResourceError
from voxdino.core.io import digest_image, read_volume, write_volume
from voxdino.core.io.options import ReadOptions
from voxdino.core.locks import lock_folder
from voxdino.preparation.memory import BackboneFacts, BackboneProbe
from voxdino.preparation.phantoms import draw_phantoms

ASKED = {"num_folds": "3", "magnification": "2"}


class OtherEachTime(BackboneProbe):
    """A probe without a child process, which finds other free memory whenever it is asked."""

    asked = 0

    def __init__(self, backbone: str) -> None:
        self.name = backbone

    def close(self) -> None:
        pass

    def describe(self) -> BackboneFacts:
        return BackboneFacts(self.name, 16, 1_000_000, "cpu")

    def choose_batch(self, *_: Any) -> tuple[int, str]:
        OtherEachTime.asked += 1
        return 2 + OtherEachTime.asked, "measured"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=3, seed=4)


@pytest.fixture
def plan_anew(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BackboneProbe", OtherEachTime)

    def plan(settings: dict[str, str]) -> steps.Planned:
        planned = steps.plan_dataset(
            phantoms,
            tmp_path,
            options=ReadOptions(),
            backbone="tiny",
            settings=settings,
            strict=True,
            num_workers=1,
        )
        planned.plan.write(tmp_path / "plan.json")
        return planned

    return plan


def edit(path: Path, name: str, value: Any) -> None:
    plan = json.loads(path.read_text())
    plan[name]["value"] = value
    path.write_text(json.dumps(plan))


def test_the_same_settings_again_give_the_same_plan(plan_anew, capsys):
    first, again = plan_anew(ASKED), plan_anew(ASKED)
    assert (first.kept, again.kept) == (False, True) and first.plan.digest() == again.plan.digest()
    assert "anew" not in capsys.readouterr().err


def test_an_edited_plan_is_kept_where_the_settings_are_in_it_already(plan_anew, tmp_path):
    plan_anew(ASKED)
    edit(tmp_path / "plan.json", "crop", [48, 32])
    for settings in ({}, ASKED, {"seed": "0"}):
        planned = plan_anew(settings)
        assert planned.kept and planned.plan.crop == (48, 32)


def test_a_plan_that_must_be_made_anew_says_what_changes(plan_anew, tmp_path, capsys):
    first = plan_anew(ASKED).plan
    edit(tmp_path / "plan.json", "crop", [48, 32])
    capsys.readouterr()
    planned = plan_anew({**ASKED, "seed": "7"})
    told = capsys.readouterr().err
    assert not planned.kept and planned.plan.seed == 7 and "anew" in told
    assert "seed 0 -> 7" in told and f"crop [48, 32] -> {list(first.crop)}" in told and "num_folds" not in told


def test_one_shard_checks_and_plans_for_all_and_the_others_read_no_file(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BackboneProbe", OtherEachTime)
    how = {"options": ReadOptions(), "backbone": "tiny", "settings": ASKED, "strict": True, "num_workers": 1}
    first = steps.plan_for_shards(phantoms, tmp_path, **how)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    with monkeypatch.context() as patch:
        patch.setattr(steps, "survey", None)
        second = steps.plan_for_shards(phantoms, tmp_path, **how)
    assert second.kept and replace(second, kept=False) == first
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json")} == written
    other = {**how, "options": ReadOptions(nan_policy="fill")}
    assert not steps.plan_for_shards(phantoms, tmp_path, **other).kept  # read otherwise: looked at again


def test_a_shard_that_waits_for_the_plan_says_so(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "_WAIT_FOR_PLAN_S", 0.01)
    how = {"options": ReadOptions(), "backbone": "tiny", "settings": ASKED, "strict": True, "num_workers": 1}
    with lock_folder(tmp_path, part="plan"), pytest.raises(ResourceError, match="another run"):
        steps.plan_for_shards(phantoms, tmp_path, **how)
    assert "waiting for another run in" in capsys.readouterr().err


def test_a_plain_call_while_a_shard_is_at_work_is_refused_before_it_changes_anything(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BackboneProbe", OtherEachTime)
    how = {"options": ReadOptions(), "backbone": "tiny", "strict": True, "num_workers": 1}
    steps.plan_for_shards(phantoms, tmp_path, settings=ASKED, **how)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    other = steps.plan_dataset(phantoms, tmp_path, settings={**ASKED, "seed": "7"}, **how)
    with lock_folder(tmp_path / "prepared", part="1of2"), pytest.raises(ResourceError, match="another run"):
        steps.prepare_planned(other, tmp_path, num_workers=1)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json")} == written


@pytest.mark.parametrize("broken_first", [True, False], ids=["repaired", "changed"])
def test_a_shard_looks_again_at_files_that_changed_since_they_were_checked(tmp_path, monkeypatch, broken_first):
    monkeypatch.setattr(steps, "BackboneProbe", OtherEachTime)
    data, workdir = draw_phantoms(tmp_path / "phantoms", num_cases=5, seed=4), tmp_path / "work"
    path = min((data / "imagesTr").glob("*"))
    volume, whole = read_volume(path), path.read_bytes()
    if broken_first:
        path.write_bytes(whole[: len(whole) // 2])
    how = {"options": ReadOptions(), "backbone": "tiny", "settings": ASKED, "strict": False, "num_workers": 1}
    assert (steps.plan_for_shards(data, workdir, **how).set_aside is not None) == broken_first
    write_volume(path, replace(volume, array=volume.array + 1))
    planned = steps.plan_for_shards(data, workdir, **how)
    assert planned.set_aside is None and len(planned.dataset.cases) == 5
    assert planned.fingerprint.cases[0].sources[f"imagesTr/{path.name}"] == digest_image(path)
