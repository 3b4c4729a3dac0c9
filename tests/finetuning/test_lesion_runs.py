"""Runs that look after small lesions, from features, slabs and images: they train and say the same again."""

import pytest

from voxdino.data.sampling import Quotas
from voxdino.finetuning.run import finetune

ROADS = {
    "features": {"loss": "tversky_ce"},
    "slabs of features": {"loss": "focal_dice", "slab": 3, "detail": "volume"},
    "images": {"loss": "dice_ce_boundary", "cache": "off"},
}


@pytest.mark.parametrize("road", ROADS)
def test_sampling_by_lesion_goes_every_road_and_repeats_itself(road, small, workdir, tmp_path):
    settings = {"quotas": Quotas(by="lesion"), "num_epochs": 1, "steps_per_epoch": 2, "cached_views": 1}
    config = small.model_copy(update={**settings, **ROADS[road]})
    curves = []
    for name in "ab":
        finetune(workdir, config, run_folder=tmp_path / name, device="cpu", on_event=lambda event: None)
        curves.append((tmp_path / name / "log.jsonl").read_text())
    assert curves[0] == curves[1] and '"loss"' in curves[0]
