"""Checkpoints: whole or absent, damage is named, the previous one is kept until the next is complete."""

import pytest
import torch

from voxdino.core.errors import CheckpointError, ResourceError
from voxdino.training import checkpoint as module
from voxdino.training.checkpoint import Checkpoint, CheckpointFolder, flatten, require_same


def make(step):
    return Checkpoint(step, {"model.weight": torch.full((50, 3), float(step))}, {"best_dice": step / 100})


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoint")
    for step in (5, 10, 15):
        folder.save(make(step))
    return folder


def names(folder):
    return sorted(path.name for path in folder.folder.iterdir())


def test_the_newest_comes_back_as_it_was_saved(folder):
    newest = folder.newest()
    assert newest.step == 15 and newest.facts == {"best_dice": 0.15}
    assert torch.equal(newest.tensors["model.weight"], torch.full((50, 3), 15.0))


def test_the_newest_two_are_kept(folder):
    assert names(folder) == ["step-00000010", "step-00000015"]


def test_nothing_saved_is_none(tmp_path):
    assert CheckpointFolder(tmp_path / "nowhere").newest() is None


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "page"])
def test_damage_is_named_with_the_newest_good_one(folder, file, damage):
    path = folder.folder / "step-00000015" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    damaged = {"flip": content, "cut": content[: len(content) // 2], "empty": b"", "page": b"<html>not found</html>"}
    path.unlink() if damage == "remove" else path.write_bytes(bytes(damaged[damage]))
    with pytest.raises(CheckpointError, match=r"step-00000015.*the newest good one is step-00000010") as caught:
        folder.newest()
    assert caught.value.exit_code == 3


def test_when_all_are_damaged_it_says_so(folder):
    for path in folder.folder.glob("*/state.safetensors"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="no good one is left"):
        folder.newest()


def test_what_a_kill_left_behind_is_swept_and_strange_names_are_no_checkpoints(folder):
    for name in ("partial-00000020", "step-00000099.old", "step-1_0", "step-000000999"):
        (folder.folder / name).mkdir()
    assert folder.newest().step == 15
    assert "partial-00000020" not in names(folder)
    folder.save(make(20))
    assert folder.newest().step == 20


def test_a_kill_between_the_new_name_and_the_end_of_the_oldest_leaves_what_no_kill_leaves(folder, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_sync", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(make(20))
    assert names(folder) == ["step-00000010", "step-00000015", "step-00000020"]
    folder.save(make(folder.newest().step))  # resumed at its last step, there is nothing more to train
    assert names(folder) == ["step-00000015", "step-00000020"]


def test_a_full_disk_leaves_the_previous_checkpoint_whole(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ResourceError, match="disk is full"):
        folder.save(make(20))
    assert folder.newest().step == 15


def test_a_failing_rename_leaves_the_previous_checkpoint_whole(folder, monkeypatch):
    original = module.Path.rename

    def refuse(self, target):
        if "partial" in self.name:
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(module.Path, "rename", refuse)
    with pytest.raises(ResourceError, match="previous checkpoint is untouched"):
        folder.save(make(20))
    assert folder.newest().step == 15


def test_saving_a_step_again_keeps_the_one_that_is_there(folder):
    folder.save(Checkpoint(15, {"model.weight": torch.zeros(1)}, {}))
    assert folder.newest().tensors["model.weight"].shape == (50, 3)


def test_every_difference_is_named(tmp_path):
    before = flatten({"lr": 0.1, "augment": {"blur": 0.2, "noise": 0.1}, "seed": 0})
    now = flatten({"lr": 0.1, "augment": {"blur": 0.3, "noise": 0.1}, "width": 8})
    with pytest.raises(
        CheckpointError, match=r"augment\.blur was 0\.2, is 0\.3; seed was 0, is None; width was None, is 8"
    ):
        require_same(before, now, where=tmp_path)
    require_same(before, dict(before), where=tmp_path)
