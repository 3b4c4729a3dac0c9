"""How the built-in backbone is made: DINOv2-S/14, made narrow, distilled on free pictures; written as float16.

python benchmarks/voxdino_tiny.py DATA --weights dinov2_vits14.safetensors [--pictures FOLDER] [--work W] [--steps 700]
       [--stop-after 9m] [--out src/voxdino/models/built_in/voxdino_tiny.safetensors]

DATA holds isic2017/ (CC0), medmnist/pneumoniamnist.npz (CC BY 4.0) and ct_mr/ (Apache-2.0). Photographs: those in
scikit-image and scikit-learn (`pip install scikit-image scikit-learn`), and FOLDER: for the weights in the package,
nine pictures of Debian's lomiri-wallpapers-16.04 (CC0 and CC BY 4.0). No case of hippocampus, EM or AdrenalMNIST3D.
Stop it and run it again: it goes on.
"""

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "china",
    "clock_motion",
    "coffee",
    "coins",
    "flower",
    "grass",
    "gravel",
    "hubble_deep_field",
    "ihc",
    "moon",
    "page",
    "retina",
    "rocket",
)
SCANS = ("example_ct", "example_ct_sm", "example_mr_sm")
LARGE = 900  # pixels: wider pictures are cut into six parts, others into four
XRAY_SIDE = 112
NOTES = (
    "DINOv2-S/14 made narrow (slim:) and distilled",
    "has seen training pictures of ISIC 2017 (CC0) and PneumoniaMNIST (MedMNIST v2, CC BY 4.0), test CT and MR of "
    "TotalSegmentator (Apache-2.0), photographs of scikit-image, scikit-learn and Debian's lomiri-wallpapers "
    "(public domain, CC0, CC BY 4.0)",
)
SETTINGS = {
    "stages.0.resolutions": [
        {"global_size": 128, "local_size": 32, "weight": 3},
        {"global_size": 192, "local_size": 32, "weight": 1},
    ],
    "stages.0.learning_rate.peak": 0.001,
    **{f"stages.0.momentum.{part}": 0.99 for part in ("start", "peak", "end")},
    "views.num_locals": 0,
    "watch_every": 350,
    "num_workers": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="a folder with more photographs")
    parser.add_argument("--work", type=Path, default=Path("workdir-tiny"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stop-after")
    parser.add_argument("--out", type=Path, default=Path("voxdino_tiny.safetensors"))
    arguments = parser.parse_args()
    work = arguments.work
    if not (work / "sources").is_dir():
        gather(arguments.data, arguments.pictures, work / "sources.part")
        (work / "sources.part").rename(work / "sources")
    weights = ("--weight", "natural=4", "--weight", "xray=0.4", "--weight", "ctmr=3")
    sources = [f"{name}={work / 'sources' / name}" for name in ("natural", "isic", "xray", "ctmr")]
    voxdino("pool", *sources, *weights, "--set", "axes=all", "--set", "max_similarity=0.97", "--workdir", work)
    options = ["--recipe", "distil", "--teacher", arguments.weights, "--name", "tiny", "--device", arguments.device]
    options += ["--backbone", f"slim:voxdino_tiny@{arguments.weights}"]
    options += ["--steps", arguments.steps, "--batch", arguments.batch]
    options += ["--stop-after", arguments.stop_after] if arguments.stop_after else []
    for key, value in SETTINGS.items():
        options += ["--set", f"{key}={json.dumps(value)}"]
    voxdino("pretrain", "--workdir", work, *options)
    pack(work / "runs" / "tiny" / "teacher.safetensors", arguments.out)


def gather(data: Path, more: Path | None, folder: Path) -> None:
    """The sources of the pool, as folders of pictures and scans."""
    for name in ("natural", "isic", "xray", "ctmr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in photographs(more):
        picture = Image.open(path).convert("RGB")
        columns, rows = (3, 2) if picture.width > LARGE else (2, 2)
        for i in range(columns):
            for j in range(rows):
                box = [i * picture.width // columns, j * picture.height // rows]
                box += [(i + 1) * picture.width // columns, (j + 1) * picture.height // rows]
                picture.crop(tuple(box)).save(folder / "natural" / f"{path.stem}-{i}{j}.png")
        picture.thumbnail((512, 512))
        picture.save(folder / "natural" / f"{path.stem}-all.png")
    for path in (data / "isic2017" / "images" / "train").iterdir():
        (folder / "isic" / path.name).write_bytes(path.read_bytes())
    with np.load(data / "medmnist" / "pneumoniamnist.npz") as arrays:
        for number, pixels in enumerate(arrays["train_images"]):
            enlarged = Image.fromarray(pixels).resize((XRAY_SIDE, XRAY_SIDE), Image.Resampling.BICUBIC)
            enlarged.save(folder / "xray" / f"{number:04d}.png")
    for name in SCANS:
        (folder / "ctmr" / f"{name}.nii.gz").write_bytes((data / "ct_mr" / f"{name}.nii.gz").read_bytes())


def photographs(more: Path | None) -> list[Path]:
    """Those of the two libraries (without importing them), and of a folder."""
    folders = [("skimage", "data"), ("sklearn", "datasets/images")]
    found = [] if more is None else sorted(path for path in more.iterdir() if path.is_file())
    for package, inside in folders:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: pip install scikit-image scikit-learn")
        found += sorted(path for path in (Path(spec.origin).parent / inside).iterdir() if path.stem in PHOTOGRAPHS)
    return found


def pack(trained: Path, out: Path) -> None:
    """float16, with the card of what the weights are made of."""
    from voxdino.models.weights import load_backbone, write_backbone

    backbone, card = load_backbone(trained)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in backbone.state_dict().items()
    }
    update = {"name": "voxdino_tiny", "notes": NOTES, "source": "pretrained by voxdino (benchmarks/voxdino_tiny.py)"}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_backbone(out, state, card.model_copy(update=update))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def voxdino(*options: object) -> None:
    done = subprocess.run([sys.executable, "-m", "voxdino", *map(str, options)], stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"voxdino {options[0]} ended with {done.returncode}")


if __name__ == "__main__":
    main()
