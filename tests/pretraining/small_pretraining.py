"""A small pool and pretrainings of few, small steps."""

import numpy as np

from voxdino.core.geometry import Grid
from voxdino.core.io import write_volume
from voxdino.core.volume import Volume
from voxdino.pretraining.config import (
    DistillationStage,
    HeadConfig,
    PretrainConfig,
    Resolution,
    SelfDistillationStage,
)
from voxdino.pretraining.pool_build import build_pool
from voxdino.pretraining.pool_slices import PoolConfig
from voxdino.pretraining.pool_sources import PoolSource
from voxdino.pretraining.schedules import Schedule, constant, rising
from voxdino.pretraining.views import ViewConfig

SIZES = (Resolution(global_size=32, local_size=16, gram_size=64),)
HEAD = HeadConfig(num_prototypes=32, hidden_dim=16, bottleneck_dim=8)
COMMON = {"batch_size": 4, "learning_rate": rising(0.0, 1e-3, 0.2), "resolutions": SIZES, "scale_rate": False}


def self_distillation(name, **changes):
    return SelfDistillationStage(**{**COMMON, "name": name, "num_steps": 3, "drop_path": 0.3, **changes})


def gram(**changes):
    return self_distillation("gram", gram_weight=constant(2.0), **changes)


def distillation(**changes):
    settings = {"num_steps": 3, "batch_size": 4, "resolutions": SIZES, "teachers": ("random:tiny",), **changes}
    return DistillationStage(learning_rate=Schedule(start=0.0, peak=1e-3, end=0.0), **settings)


def pretraining(*stages, **changes):
    settings = {"backbone": "random:tiny", "dino_head": HEAD, "ibot_head": HEAD, "views": ViewConfig(num_locals=2)}
    settings |= {"watch_every": 0, "precision": "off", "num_workers": 0, "checkpoint_every_s": 1e9}
    return PretrainConfig(stages=stages, **{**settings, **changes})


def draw_pool(root, first_index=0):
    """Three volumes of a block on noise in root/data, and their pool in root/work."""
    for index in range(3):
        rng = np.random.default_rng(first_index + index)
        array = rng.normal(100, 20, (1, 24, 20, 6)).astype(np.float32)
        array[0, 5 + index : 15, 4:12] += 100
        write_volume(root / f"data/{index}.nii.gz", Volume(array, Grid.from_spacing((24, 20, 6), (1.0, 1.0, 4.0))))
    source = PoolSource(name="blocks", path=str(root / "data"))
    build_pool([source], root / "work", PoolConfig(max_similarity=None), num_workers=1)
    return root / "work"
