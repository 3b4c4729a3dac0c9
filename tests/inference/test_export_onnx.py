"""Laws of exported models: ONNX Runtime and NumPy make the label maps of torch; a probe guards what was prepared."""

import builtins
import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import make_card, make_plan, make_segmenter, make_volume, model_by_hand

from voxdino.core.errors import CheckpointError, ResourceError, UsageError
from voxdino.core.io import read_label_map, write_volume
from voxdino.core.labels import LabelSet, Region
from voxdino.core.safe_files import Manifest
from voxdino.inference import parts
from voxdino.inference.choose import load_segmenting, plan_of
from voxdino.inference.export import class_indices as torch_indices
from voxdino.inference.export_card import CARD_NAME, NETWORK_NAME, is_export
from voxdino.inference.load import load_model, save_model
from voxdino.inference.numpy_engine import class_indices, segment
from voxdino.inference.onnx_export import export_model
from voxdino.inference.onnx_model import load_export
from voxdino.inference.postprocess import FILE_NAME, Postprocessing, Rule
from voxdino.inference.predictor import predict_volume
from voxdino.inference.settings import PredictSettings
from voxdino.models.backbones.no_backbone import NoBackbone, NoBackboneConfig
from voxdino.preparation import orientation
from voxdino.preparation.intensity import normalise

USUAL = PredictSettings(amp="off")
REGIONS = LabelSet(
    names=("background", "whole", "core"),
    ids=(0, 5, 9),
    regions=(Region(name="both", ids=(5, 9)), Region(name="core", ids=(9,))),
    region_ids=(5, 9),
)


def by_hand(plan):
    """A network of any tile size that looks at the slices it may see; and the same for NumPy."""
    k, num = plan.context_slices, plan.labels.num_outputs

    def logits(image):
        deep = image.shape[2] - 2 * k
        seen = sum(image[:, :1, i : i + deep] for i in range(2 * k + 1))
        ramp = torch.linspace(0.5, 1.5, image.shape[-1])
        return torch.cat([torch.sin(seen * (c + 1) * ramp) for c in range(num)], dim=1)

    model = model_by_hand(logits, plan)
    return model, lambda image: logits(torch.from_numpy(image)).numpy()


PLANS = {
    "slices": {},
    "context": {"context_slices": 1, "tile": (6, 5)},
    "resampled": {"in_plane_spacing": (0.5, 0.6), "slice_axis": "A"},
    "slabs": {"slab": 2, "tile": (6, 8)},
    "regions": {"labels": REGIONS},
}


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("settings", [{}, {"overlap": 0.2, "mirror": True}, {"gate": "on"}], ids=str)
def test_numpy_makes_the_label_map_of_torch(changes, settings):
    plan = make_plan(**changes)
    model, network = by_hand(plan)
    volume, settings = make_volume((13, 9, 7)), PredictSettings(amp="off", **settings)
    volume.array[:, :5] = -900  # air
    ours = segment(network, plan, volume, settings, case="c", slices_at_once=2)
    torchs = predict_volume(model, volume, settings)
    assert ours.grid.same_as(torchs.grid)
    assert (ours.array == torchs.array).mean() > 0.9985  # ties within rounding
    assert len(np.unique(torchs.array)) > 1


@pytest.mark.parametrize("size", [(5, 7), (11, 4), (3, 3), (9, 16)])
@pytest.mark.parametrize("labels", [make_plan().labels, REGIONS], ids=["classes", "regions"])
def test_classes_are_chosen_alike_at_every_size(size, labels):
    logits = np.random.default_rng(0).normal(size=(labels.num_outputs, 5, 7)).astype(np.float32)
    expected = torch_indices(torch.from_numpy(logits), size, labels).numpy()
    np.testing.assert_array_equal(class_indices(logits, size, labels), expected)


def test_numpy_refuses_logits_that_are_no_numbers():
    plan = make_plan()
    with pytest.raises(CheckpointError, match="NaN"):
        segment(
            lambda x: np.full((len(x), 3, 1, 8, 8), np.nan, "f4"),
            plan,
            make_volume(),
            USUAL,
            case="c",
            slices_at_once=1,
        )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with cleaning up, and its export: made once, by a process of its own, without the tests' shape checks."""
    folder = tmp_path_factory.mktemp("export")
    plan = make_plan(context_slices=1, input_builder="neighbours", tile=(8, 12), in_plane_spacing=(0.5, 0.5))
    save_model(folder / "run", make_segmenter(plan), plan, make_card())
    Postprocessing(rules={"liver": Rule(largest=True)}).write(folder / "run" / FILE_NAME)
    export(folder)
    return folder


def export(folder):
    command = [sys.executable, "-m", "voxdino", "export", str(folder / "run"), "--out", str(folder / "onnx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "its probe gives torch's logits" in done.stdout


@pytest.mark.slow
def test_onnx_runtime_makes_the_label_map_of_torch(exported):
    volume = make_volume((17, 21, 5))
    for clean_up in (True, False):
        expected = load_segmenting([exported / "run"], clean_up=clean_up, device="cpu").segment(volume, USUAL, case="c")
        found = load_segmenting([exported / "onnx"], clean_up=clean_up, device="cpu").segment(volume, USUAL, case="c")
        assert (found.array == expected.array).mean() >= 0.9999
        assert found.grid.same_as(expected.grid)
        assert len(np.unique(expected.array)) > 1


SEES_SLABS = {
    "frozen_conv3d": {"decoder": "conv3d", "decoder_width": 8},
    "unet_3d": {"decoder": "unet_3d", "backbone": "none", "decoder_settings": {"plan_size": (4, 8, 8)}},
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", SEES_SLABS)
def test_models_that_see_slabs_are_exported_for_any_number_of_slices(tmp_path, recipe):
    plan, encoder = make_plan(slab=4, tile=(8, 12)), NoBackbone(NoBackboneConfig())
    card = make_card(config=encoder.config) if recipe == "unet_3d" else make_card()
    segmenter = make_segmenter(plan, encoder if recipe == "unet_3d" else None, slab=4, **SEES_SLABS[recipe])
    save_model(tmp_path / "run", segmenter, plan, card)
    export(tmp_path)
    torchs, ours = (load_segmenting([tmp_path / name], device="cpu") for name in ("run", "onnx"))
    for shape in ((17, 21, 11), (9, 11, 5), (13, 9, 1)):  # overlapping slabs, one that is longer than usual, one slice
        volume = make_volume(shape)
        expected, found = (model.segment(volume, USUAL, case="c").array for model in (torchs, ours))
        assert (found == expected).mean() >= 0.9999
        assert len(np.unique(expected)) > 1


@pytest.mark.slow
def test_the_card_says_all_that_surrounds_the_network(exported):
    card = json.loads((exported / "onnx" / CARD_NAME).read_text())
    assert is_export(exported / "onnx") and not is_export(exported / "run")
    assert card["plan"] == plan_of(exported / "run").model_dump(mode="json")
    assert card["clean_up"]["rules"]["liver"]["largest"] is True
    assert card["licence"] == "DINOv3 License"
    assert card["run_digest"] == load_model(exported / "run").digest


@pytest.mark.slow
def test_an_export_into_a_folder_of_something_else_is_refused(exported):
    with pytest.raises(UsageError, match="holds other files"):
        export_model(exported / "run", exported / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, words", [({"second_look": 2.0}, "a second look needs torch"), ({"amp": "bf16"}, "bfloat16 needs torch")]
)
def test_what_an_export_cannot_do_is_refused(exported, changes, words):
    with pytest.raises(UsageError, match=words):
        load_export(exported / "onnx").segment(make_volume(), PredictSettings(**changes), case="c")


@pytest.mark.slow
def test_an_exported_model_neither_votes_nor_is_guided(exported):
    with pytest.raises(UsageError, match="works alone"):
        load_segmenting([exported / "onnx", exported / "run"])
    with pytest.raises(UsageError, match="works alone"):
        load_segmenting([exported / "onnx"], localise=exported / "run")


@pytest.mark.slow
def test_a_device_that_onnx_runtime_lacks_is_named(exported):
    with pytest.raises(ResourceError, match="no mps device"):
        load_export(exported / "onnx", device="mps")


@pytest.mark.slow
def test_a_damaged_network_is_refused(exported, tmp_path):
    for name in (CARD_NAME, NETWORK_NAME, "manifest.json"):
        (tmp_path / name).write_bytes((exported / "onnx" / name).read_bytes())
    with (tmp_path / NETWORK_NAME).open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_export(tmp_path)


@pytest.mark.slow
def test_without_onnx_runtime_it_is_said_what_to_install(exported, monkeypatch):
    known = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("onnx"):
            raise ImportError(f"No module named {name!r}")
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match=r"voxdino\[onnx\]"):
        load_export(exported / "onnx")
    with pytest.raises(ResourceError, match=r"voxdino\[export\]"):
        export_model(exported / "run", exported / "again")
    assert not (exported / "again").exists()


def changed_plan(folder, **changes):
    """The plan on disk says otherwise, and the manifest agrees: only the probe can tell."""
    plan = plan_of(folder).model_copy(update=changes)
    plan.write(folder / "plan.json")
    Manifest.of(folder, Manifest.read(folder).files).write(folder)


def test_a_model_is_refused_once_its_plan_prepares_images_otherwise(run_folder):
    load_model(run_folder)
    changed_plan(run_folder, tile=(12, 8))
    with pytest.raises(CheckpointError, match="prepared otherwise"):
        load_model(run_folder)


@pytest.mark.parametrize("what", ["_RUNS_UP", "normalise"])
def test_a_model_is_refused_once_voxdino_prepares_images_otherwise(run_folder, monkeypatch, what):
    if what == "normalise":
        monkeypatch.setattr(parts, what, lambda raw, scaling: normalise(raw, scaling) + 0.01)
    else:
        monkeypatch.setitem(orientation._RUNS_UP, "S", (True, True, False))
    with pytest.raises(CheckpointError, match="prepared otherwise"):
        load_model(run_folder)


def test_a_model_is_refused_once_its_network_computes_otherwise(run_folder, monkeypatch):
    from voxdino.models.decoders.linear import LinearDecoder

    forward = LinearDecoder.forward
    monkeypatch.setattr(LinearDecoder, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs).flip(1))
    with pytest.raises(CheckpointError, match="other logits"):
        load_model(run_folder)


def test_a_model_of_before_there_were_probes_is_still_read(run_folder):
    (run_folder / "probe.json").unlink()
    Manifest.of(run_folder, ("model.json", "model.safetensors", "plan.json")).write(run_folder)
    assert load_model(run_folder).name == "first"


def test_writing_a_model_leaves_it_in_the_mode_it_was_in(tmp_path):
    plan = make_plan()
    segmenter = make_segmenter(plan).train()
    save_model(tmp_path / "run", segmenter, plan, make_card())
    assert segmenter.training and segmenter.decoder.training


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_torch_the_command_makes_the_label_map_of_torch(exported, tmp_path):
    """In an environment of its own, with all that voxdino depends on but torch."""
    root = Path(__file__).parents[2]
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = [one for one in needed if not one.startswith("torch")]
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*args):
        done = subprocess.run([python, *map(str, args)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *needed, "onnxruntime", "-c", root / "constraints.txt")
    run(*pip, "--no-deps", root)
    volume = make_volume((17, 21, 5))
    write_volume(tmp_path / "scan.nii.gz", volume)
    run("-m", "voxdino", "predict", "scan.nii.gz", "--run", exported / "onnx", "--out", "out")
    code = "import importlib.util, sys, voxdino; sys.exit(importlib.util.find_spec('torch') is not None)"
    run("-c", code)
    run("-c", f"import voxdino; print(voxdino.load({str(exported / 'onnx')!r}).predict('scan.nii.gz').grid)")
    expected = load_segmenting([exported / "run"], device="cpu").segment(volume, USUAL, case="c")
    found = read_label_map(tmp_path / "out" / "scan.nii.gz")
    assert (found.array == expected.array).mean() >= 0.9999
    assert found.grid.same_as(expected.grid)
