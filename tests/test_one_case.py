"""One case through the whole program: a phantom from NIfTI to report, in a few seconds, on its own grid."""

import json

import numpy as np
import pytest
import torch

from voxdino.core.io import read_grid, read_label_map
from voxdino.core.safe_files import write_json
from voxdino.evaluation.evaluate import evaluate
from voxdino.evaluation.pictures import overlay_picture
from voxdino.evaluation.report import report_rows
from voxdino.finetuning.config import FinetuneConfig
from voxdino.finetuning.model import effective_plan
from voxdino.finetuning.run import finetune
from voxdino.inference.load import load_model
from voxdino.inference.run import output_file, predict_cases
from voxdino.preparation.check import survey
from voxdino.preparation.dataset import read_case, read_dataset
from voxdino.preparation.phantoms import LABELS, draw_phantoms
from voxdino.preparation.plan import Plan, make_plan
from voxdino.preparation.prepare import prepare
from voxdino.preparation.splits import make_splits

CONFIG = FinetuneConfig(
    backbone="random:tiny",
    adaptation="full",
    decoder_width=32,
    num_epochs=2,
    steps_per_epoch=20,
    batch_size=4,
    learning_rate=2e-3,
    backbone_lr_scale=1.0,
    ema_decay=0.9,
    validation_slices=8,
)


@pytest.fixture(autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_from_nifti_to_report(tmp_path):
    workdir, run_folder = tmp_path / "work", tmp_path / "work" / "runs" / "first"

    # files -> Volume -> fingerprint.json -> plan.json -> prepared cases
    dataset = read_dataset(draw_phantoms(tmp_path / "phantoms", num_cases=3, seed=0))
    report, fingerprint = survey(dataset, num_workers=1)
    assert not report.errors
    settings = {"num_folds": "3", "magnification": "1.0"}
    plan = make_plan(fingerprint, dataset, backbone=CONFIG.backbone, settings=settings, memory="skip")
    assert plan.slice_axis == "S"
    assert [name for name, _ in plan.labels.foreground] == [name for name in LABELS if name != "background"]
    splits = make_splits(dataset, num_folds=plan.num_folds, seed=plan.seed)
    prepare(dataset, plan, workdir, num_workers=1)
    plan.write(workdir / "plan.json")
    write_json(workdir / "splits.json", [split.to_json() for split in splits])

    # samples -> batches -> a trained model
    finetune(workdir, CONFIG, run_folder=run_folder, fold=0, device="cpu", on_event=lambda event: None)
    model = load_model(run_folder)
    assert model.plan == effective_plan(CONFIG, Plan.read(workdir / "plan.json"))

    # -> label map on the original grid
    case = next(case for case in dataset.cases if case.id == splits[0].val[0])
    predict_cases([case], model, tmp_path / "predictions")
    predicted = output_file(case, tmp_path / "predictions")
    grid, _ = read_grid(case.images[0])
    prediction = read_label_map(predicted)
    assert prediction.array.shape == grid.shape
    np.testing.assert_allclose(prediction.grid.affine, grid.affine, atol=1e-6)

    # -> scores -> report
    assert case.label is not None
    scores = evaluate([(case.id, predicted, case.label)], plan.labels)
    scores.write(tmp_path / "scores.json")
    assert not scores.failed
    assert (scores.mean("dice", "liver") or 0) > 0.5  # 40 steps of a tiny backbone learn where the liver is
    assert json.loads((tmp_path / "scores.json").read_text())["num_cases"] == 1
    assert [row[0] for row in report_rows(scores)[1]] == ["liver", "spleen", "kidney", "lesion", "mean"]
    volume, reference = read_case(case, plan.read_options, plan.labels)
    assert reference is not None
    overlay_picture(tmp_path / "picture.png", volume, reference, prediction, plan.labels, title=case.id)
    assert (tmp_path / "picture.png").stat().st_size > 20_000
