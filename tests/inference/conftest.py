"""A run folder with a tiny trained model."""

from pathlib import Path

import pytest
from small_models import make_card, make_plan, make_segmenter

from voxdino.inference.load import LoadedModel, load_model, save_model


@pytest.fixture
def run_folder(tmp_path) -> Path:
    plan = make_plan()
    save_model(tmp_path / "runs" / "first", make_segmenter(plan), plan, make_card())
    return tmp_path / "runs" / "first"


@pytest.fixture
def model(run_folder) -> LoadedModel:
    return load_model(run_folder)
