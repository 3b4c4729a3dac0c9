"""Classification end to end: the probe, training on from it, calibration, the folder it leaves, new cases."""

import csv

import numpy as np
import pytest
import torch

from voxdino.core.errors import CheckpointError, ImageError, PartialError, UsageError
from voxdino.core.geometry import Grid
from voxdino.core.io import write_volume
from voxdino.core.volume import Volume
from voxdino.data.labelled import ImageShape, assemble_images, read_image
from voxdino.finetuning.classify import ClassifyRecord, finetune_classifier
from voxdino.finetuning.classify_recipes import CLASSIFY_RECIPES
from voxdino.inference.choose import is_classifier
from voxdino.inference.classify import classify_cases, load_classifier
from voxdino.models.backbones.build import build_backbone
from voxdino.models.classifier import build_classifier, encoder_config
from voxdino.models.registry import BACKBONES
from voxdino.preparation.classification import LabelledCase, open_classification_set
from voxdino.preparation.intensity import ChannelPolicy
from voxdino.report.html import render
from voxdino.report.make import make_page

torch.set_num_threads(1)

SIZES = {"train": 24, "val": 10, "test": 6}
GREY = ChannelPolicy(name="grey", source=0, kind="photo", lower=0.0, upper=255.0, mean=100.0, sd=50.0)


def write_set(path, shape=(12, 12), labels=1):
    """Class 1 is bright on the left."""
    arrays = {}
    for part, number in SIZES.items():
        rng = np.random.default_rng(number)
        y = np.arange(number)[:, None] % 2
        images = rng.integers(0, 80, (number, *shape))
        images[..., : shape[-1] // 2] += (150 * y).reshape(-1, *(1,) * len(shape))
        arrays[f"{part}_images"] = images.astype(np.uint8)
        arrays[f"{part}_labels"] = np.concatenate([y, 1 - y, y], axis=1)[:, :labels].astype(np.uint8)
    np.savez(path, **arrays)
    return open_classification_set(path)


def small(recipe, **changes):
    settings = {"backbone": "random:tiny", "side": 32, "num_epochs": 1, "steps_per_epoch": 3, "batch_size": 4}
    settings |= {"num_workers": 0, "amp": "off", "num_slices": 3}
    return CLASSIFY_RECIPES[recipe]().model_copy(update=settings | changes)


@pytest.mark.parametrize("recipe", CLASSIFY_RECIPES)
def test_every_recipe_tells_bright_from_dark_and_is_read_back_whole(tmp_path, recipe):
    found, run = write_set(tmp_path / "set.npz"), tmp_path / "run"
    summary = finetune_classifier(found, small(recipe), run_folder=run, device="cpu", on_event=lambda event: None)
    assert summary.accuracy > 0.8 and summary.num_steps == (0 if recipe == "classify_linear" else 3)
    record = ClassifyRecord.read(run / "run.json")
    assert record.num_cases == SIZES and record.outcome.temperature == summary.temperature
    assert record.num_parameters["trained"] >= 2 and is_classifier(run)
    assert "device" in render(make_page([run]))
    predicted = classify_cases(found.splits["test"], load_classifier(run), tmp_path / "out")
    right = [case.predicted == (str(n % 2),) for n, case in enumerate(predicted.cases.values())]
    assert sum(right) >= 5
    rows = list(csv.reader((tmp_path / "out/probabilities.csv").read_text().splitlines()))
    assert rows[0] == ["case", "predicted", "0", "1"] and len(rows) == 7
    assert sum(map(float, rows[1][2:])) == pytest.approx(1, abs=1e-5)


def test_the_same_call_again_does_nothing_and_another_set_is_refused(tmp_path):
    found, run = write_set(tmp_path / "set.npz"), tmp_path / "run"
    first = finetune_classifier(found, small("classify_linear"), run_folder=run, on_event=lambda event: None)
    again = finetune_classifier(found, small("classify_linear"), run_folder=run, on_event=lambda event: None)
    assert again == first.model_copy(update={"was_finished": True})
    other = write_set(tmp_path / "other.npz", shape=(14, 12))
    with pytest.raises(CheckpointError, match="dataset"):
        finetune_classifier(other, small("classify_linear"), run_folder=run, on_event=lambda event: None)


def test_a_finished_run_is_not_that_of_other_images_under_the_same_names(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    parts = ["train"] * 4 + ["val"] * 2 + ["test"]
    for number in range(7):
        draw_picture(folder / f"{number}.png", 60 + 90 * (number % 2))
    rows = [f"{number}.png,{number % 2},{part}" for number, part in enumerate(parts)]
    (folder / "labels.csv").write_text("\n".join(("file,label,split", *rows)) + "\n")
    arguments = {"run_folder": tmp_path / "run", "device": "cpu", "on_event": lambda event: None}
    finetune_classifier(open_classification_set(folder), small("classify_linear"), **arguments)
    draw_picture(folder / "6.png", 10)  # of test, which no run looks at
    assert finetune_classifier(open_classification_set(folder), small("classify_linear"), **arguments).was_finished
    for changed in ("1.png", "4.png"):
        before = (folder / changed).read_bytes()
        draw_picture(folder / changed, 11)
        with pytest.raises(CheckpointError, match="dataset was"):
            finetune_classifier(open_classification_set(folder), small("classify_linear"), **arguments)
        (folder / changed).write_bytes(before)


def draw_picture(path, value):
    write_volume(path, Volume(np.full((1, 12, 12), value, np.uint8), Grid.from_spacing((12, 12), unit="px")))


@pytest.mark.parametrize("labels, kind", [(1, "single"), (3, "multi")])
def test_volumes_are_classified_by_their_slices(tmp_path, labels, kind):
    found, run = write_set(tmp_path / "set.npz", shape=(5, 9, 8), labels=labels), tmp_path / "run"
    config = small("classify_linear", pooling="abmil", slice_axis=1)
    finetune_classifier(found, config, run_folder=run, on_event=lambda event: None)
    loaded = load_classifier(run)
    assert (loaded.card.kind, loaded.card.shape.num_slices, loaded.card.shape.slice_axis) == (kind, 3, 1)
    together = classify_cases(found.splits["test"], loaded, tmp_path / "all")
    alone = classify_cases(found.splits["test"][2:3], loaded, tmp_path / "one")
    name = found.splits["test"][2].id
    assert alone.cases[name] == together.cases[name] and len(together.cases[name].probabilities) == max(labels, 2)


def test_a_case_that_cannot_be_read_is_named_and_the_others_are_done(tmp_path):
    found, run = write_set(tmp_path / "set.npz"), tmp_path / "run"
    finetune_classifier(found, small("classify_linear"), run_folder=run, on_event=lambda event: None)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = tmp_path / "good.png"
    write_volume(good, Volume(np.full((1, 9, 7), 30, np.uint8), Grid.from_spacing((9, 7), unit="px")))
    cases = [LabelledCase("broken", tmp_path / "broken.png", ()), LabelledCase("good", good, ())]
    loaded = load_classifier(run)
    with pytest.raises(PartialError, match="1 of 2 cases could not be read; first broken"):
        classify_cases(cases, loaded, tmp_path / "out")
    assert "good" in (tmp_path / "out/probabilities.csv").read_text()
    with pytest.raises(ImageError):
        classify_cases(cases, loaded, tmp_path / "strict", strict=True)
    with pytest.raises(UsageError, match="there is no case"):
        classify_cases([], loaded, tmp_path / "none")
    (run / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_classifier(run)


def test_images_become_squares_with_their_darkest_value_around_and_slices_are_spread(tmp_path):
    image = np.full((1, 4, 8), 200, np.uint8)
    image[0, 0, 0] = 50
    write_volume(tmp_path / "wide.png", Volume(image, Grid.from_spacing((4, 8), unit="px")))
    shape = ImageShape(channels=(GREY,), side=8)
    read = read_image(LabelledCase("a", tmp_path / "wide.png", (0,)), shape)
    assert read.shape == (1, 1, 8, 8)
    torch.testing.assert_close(read[0, 0, :2], torch.full((2, 8), -1.0))
    torch.testing.assert_close(read[0, 0, 3:6], torch.full((3, 8), 2.0))
    levels = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None], (9, 8, 8))
    write_volume(tmp_path / "deep.nii.gz", Volume(levels[None].copy(), Grid.from_spacing((9, 8, 8), (1.0, 1.0, 1.0))))
    cases = [LabelledCase(name, tmp_path / "deep.nii.gz", (1,)) for name in "ab"]
    batch = assemble_images(cases, shape.model_copy(update={"num_slices": 3}))
    assert batch.image.shape == (2, 1, 3, 8, 8) and batch.label.tolist() == [1, 1]
    torch.testing.assert_close(batch.image[0, 0, :, 0, 0], (torch.tensor([1.0, 4.0, 7.0]) - 100) / 50)
    every = read_image(cases[0], shape.model_copy(update={"num_slices": 0, "slice_axis": 2}))
    assert every.shape == (1, 8, 8, 8)


@pytest.mark.parametrize("adaptation, some", [("frozen", False), ("lora", True), ("full", True)])
def test_what_trains_is_in_a_group_and_gets_a_gradient(adaptation, some):
    config = encoder_config("tiny", None, num_channels=1, settings={"adaptation": adaptation})
    model = build_classifier(config, build_backbone(BACKBONES["tiny"]), num_classes=3, kind="single", pooling="abmil")
    torch.nn.init.normal_(model.head.to_logits.weight)
    torch.nn.init.normal_(model.head.pool.score.weight)
    model(torch.randn(2, 1, 2, 32, 32)).square().sum().backward()
    grouped = {
        id(value)
        for group in model.parameter_groups(1e-3, backbone_lr_scale=0.1, weight_decay=0.0)
        for value in group["params"]
    }
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {id(value) for value in trained.values()} == grouped
    assert any("backbone" in name for name in trained) is some
    assert all(value.grad is not None for value in trained.values())
