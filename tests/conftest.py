"""Fixtures of every layer: the folder of shared real data."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real data, weights and reference values beside the project; tests that need them skip where absent."""
    folder = Path(os.environ.get("VOXDINO_TEST_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data folder ({folder.name}/ beside the project, or VOXDINO_TEST_SHARED)")
    return folder
