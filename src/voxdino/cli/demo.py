"""`voxdino demo`: the whole road with no data, no weights and no network, in a few minutes on a CPU."""

from pathlib import Path

from voxdino.cli.options import Device, DeviceOption, JsonOption, WorkdirOption, WorkersOption
from voxdino.cli.output import end, relative, say

DEMO_WORKDIR = Path("demo-output")
BACKBONE = "voxdino_tiny"
NUM_PHANTOMS = 30
PLAN = {"magnification": "4.0", "batch_size": "4"}
TRAINING = {"decoder_width": "32", "cached_views": "1", "num_epochs": "8"}

NOTICE = """\
This was a demonstration on drawn phantoms, with the small backbone that comes with voxdino, frozen. It says that the
program works, not how good it is. With your data and a larger backbone:
  voxdino weights pull dinov3_vits16     (once; or voxdino weights import FILE)
  voxdino run DATASET                    (nnU-Net or MSD layout, or a folder with images and a CSV table)"""


def demo(
    workdir: WorkdirOption = DEMO_WORKDIR,
    workers: WorkersOption = None,
    device: DeviceOption = Device.cpu,
    json: JsonOption = False,
) -> None:
    """Draw CT-like phantoms, train a tiny SegDINO on them, predict and score those held back. Needs no network."""
    from voxdino.cli.budget import Budget
    from voxdino.cli.road import go, print_road
    from voxdino.cli.steps import plan_dataset, resolve_config
    from voxdino.core.io.options import ReadOptions
    from voxdino.preparation.phantoms import draw_phantoms

    phantoms = workdir / "phantoms"
    if not (phantoms / "dataset.json").is_file():  # written last
        say(f"drawing {NUM_PHANTOMS} phantoms into {relative(phantoms)}")
        draw_phantoms(phantoms, num_cases=NUM_PHANTOMS, seed=0)
    planned = plan_dataset(
        phantoms,
        workdir,
        options=ReadOptions(),
        backbone=BACKBONE,
        settings=PLAN,
        strict=True,
        num_workers=workers,
    )
    road = go(
        planned,
        resolve_config("segdino_v2", backbone=BACKBONE, settings=TRAINING),
        workdir=workdir,
        run_folder=workdir / "runs" / "demo",
        fold=0,
        device=device,
        num_workers=workers,
        budget=Budget(None),
    )
    if not json:
        print_road(road)
        print(NOTICE)
    end(road.to_json(), road.error(), as_json=json)
