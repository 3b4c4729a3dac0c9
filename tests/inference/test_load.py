"""Laws of saved models: the same logits back, damage refused by name, licence inherited."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import LABELS, make_card, make_plan, make_segmenter

from voxdino.core.errors import CheckpointError
from voxdino.core.safe_files import Manifest
from voxdino.inference.load import MODEL_FILES, load_model, save_model
from voxdino.models.precision import channels_last

SETTINGS = [
    {},
    {"decoder": "tpa_sad", "decoder_width": 16},
    {"adaptation": "lora", "lora_rank": 2},
    {"adaptation": "last_k", "last_k": 1},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_a_saved_model_gives_the_same_logits(tmp_path, changes):
    plan = make_plan()
    segmenter = make_segmenter(plan, **changes)
    channels_last(segmenter)  # as training does; another order of the weights may sum in another order
    save_model(tmp_path / "run", segmenter, plan, make_card())
    loaded = load_model(tmp_path / "run")
    image = torch.randn(2, 1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.segmenter(image).logits, segmenter(image).logits)
    assert not loaded.segmenter.training
    assert not any(parameter.requires_grad for parameter in loaded.segmenter.parameters())
    assert loaded.plan.digest() == plan.digest()
    assert loaded.name == "run"


def test_half_precision_weights_are_stored_so_without_loss(tmp_path):
    plan = make_plan()
    segmenter = make_segmenter(plan)
    for dtype, parameter in ((torch.float16, "backbone.norm.weight"), (torch.bfloat16, "backbone.norm.bias")):
        value = segmenter.get_parameter(parameter)
        value.data = value.data.to(dtype).float() * (1 if dtype == torch.float16 else 2.0**-40)
    save_model(tmp_path, segmenter, plan, make_card())
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["backbone.norm.weight"].dtype == torch.float16
    assert stored["backbone.norm.bias"].dtype == torch.bfloat16
    assert stored["decoder.to_logits.weight"].dtype == torch.float32
    loaded = load_model(tmp_path).segmenter.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in segmenter.state_dict().items())


def test_the_licence_of_the_weights_is_inherited(run_folder):
    assert load_model(run_folder).card.licence == "DINOv3 License"
    assert json.loads((run_folder / "model.json").read_text())["model"]["licence"] == "DINOv3 License"


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("place", [0.2, 0.6, 0.99])
def test_one_flipped_bit_is_refused_with_the_files_name(run_folder, name, place):
    data = bytearray((run_folder / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (run_folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: is damaged"):
        load_model(run_folder)


@pytest.mark.parametrize("name", [*MODEL_FILES, "manifest.json"])
def test_a_missing_or_cut_file_is_refused(run_folder, name):
    copy = run_folder.with_name("cut")
    shutil.copytree(run_folder, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:-7])
    with pytest.raises(Exception, match=name) as caught:
        load_model(copy)
    assert caught.value.exit_code == 3
    (run_folder / name).unlink()
    with pytest.raises(CheckpointError):
        load_model(run_folder)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such run folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="never completed"):
        load_model(tmp_path)


def _rewrite(run_folder, change):
    state = load_file(run_folder / "model.safetensors")
    change(state)
    save_file(state, run_folder / "model.safetensors")
    Manifest.of(run_folder, MODEL_FILES).write(run_folder)


def _drop(state):
    del state["decoder.to_logits.bias"]


def _reshape(state):
    state["decoder.to_logits.bias"] = torch.zeros(7)


def _add(state):
    state["extra"] = torch.zeros(1)


def _break(state):
    state["decoder.to_logits.bias"][1] = float("nan")


@pytest.mark.parametrize(
    "change, words",
    [
        (_drop, "decoder.to_logits.bias is missing"),
        (_reshape, r"is \[7\], not \[3\]"),
        (_add, "extra is unexpected"),
        (_break, "holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run_folder, change, words):
    _rewrite(run_folder, change)
    with pytest.raises(CheckpointError, match=words):
        load_model(run_folder)


def test_the_digest_tells_models_apart(tmp_path, run_folder):
    plan = make_plan(tile=(16, 16))
    save_model(tmp_path / "b", make_segmenter(plan), plan, make_card())
    assert load_model(run_folder).digest == load_model(run_folder).digest != load_model(tmp_path / "b").digest
    assert load_model(tmp_path / "b").plan.labels == LABELS
