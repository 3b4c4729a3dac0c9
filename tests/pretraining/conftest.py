"""A small pool, made once."""

import shutil

import pytest
import torch
from small_pretraining import draw_pool

torch.set_num_threads(1)  # several tests share the machine; and the same bits everywhere


@pytest.fixture(scope="session")
def pool_folder(tmp_path_factory):
    return draw_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def workdir(pool_folder, tmp_path):
    shutil.copytree(pool_folder / "pool", tmp_path / "pool")
    return tmp_path
