"""The catalogue of bad inputs: each makes one thing wrong in a small sound data set, and says what must be told."""

import gzip
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

SHAPE = (9, 8, 7)
TURN = np.array([[-0.96, 0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
AFFINE = np.block([[TURN * (0.8, 0.9, 2.5), np.array([[5], [-7], [11]])], [np.array([[0, 0, 0, 1]])]])


@dataclass(frozen=True)
class BadInput:
    """name: row of the catalogue and what it is. words: the file and the fact that the message must name."""

    name: str
    code: int
    words: tuple[str, ...]
    args: Callable[[Path], list[str]]


CATALOGUE: list[BadInput] = []


def bad(name: str, *words: str, code: int = 3) -> Callable[[Callable[[Path], list[str] | None]], None]:
    """Add a case: the function gets an empty folder, makes the data set and returns the command (default: check it)."""

    def add(make: Callable[[Path], list[str] | None]) -> None:
        CATALOGUE.append(BadInput(name, code, words, lambda folder: make(folder) or ["check", str(folder)]))

    return add


def volume_set(folder: Path, num_cases: int = 3) -> Path:
    """A sound nnU-Net data set of uncompressed and compressed volumes; returns the image of case_1."""
    rng = np.random.default_rng(0)
    for number in range(num_cases):
        image = rng.normal(40, 20, SHAPE).astype(np.int16)
        label = np.zeros(SHAPE, np.uint8)
        label[2:6, 2:6, 2:5] = 1
        save(image, folder / "imagesTr" / f"case_{number}_0000.nii.gz")
        save(label, folder / "labelsTr" / f"case_{number}.nii.gz")
    describe(folder)
    return folder / "imagesTr" / "case_1_0000.nii.gz"


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def describe(folder: Path, **changes: object) -> Path:
    value: dict[str, object] = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in {**value, **changes}.items() if v is not None}))
    return folder / "dataset.json"


def label_of(folder: Path) -> Path:
    return folder / "labelsTr" / "case_1.nii.gz"


def header(folder: Path, offset: int, layout: str, *values: float) -> None:
    """Overwrite fields of case_1's NIfTI header in place."""
    path = volume_set(folder)
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))


def picture_set(folder: Path, num_cases: int = 4) -> Path:
    """A sound folder + CSV of RGB pictures with 0/1 masks; returns the image of case 1."""
    rng = np.random.default_rng(0)
    rows = ["image,label"]
    for number in range(num_cases):
        rows.append(f"images/{number}.png,masks/{number}.png")
        mask = np.zeros((24, 20), np.uint8)
        mask[5:15, 5:12] = 1
        picture(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8), folder / "images" / f"{number}.png")
        picture(mask, folder / "masks" / f"{number}.png")
    (folder / "dataset.csv").write_text("\n".join(rows) + "\n")
    return folder / "images" / "1.png"


def picture(array: np.ndarray, path: Path, **settings: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **settings)


def table(folder: Path, *rows: str) -> None:
    picture_set(folder)
    (folder / "dataset.csv").write_text("\n".join(rows) + "\n")


# A. image files


@bad("A1 gzip cut at 1 %", "case_1_0000.nii.gz", "truncated")
def _(folder: Path) -> None:
    path = volume_set(folder)
    save(np.random.default_rng(0).normal(40, 20, (40, 40, 40)).astype(np.int16), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 100])


@bad("A1 gzip cut in the middle", "case_1_0000.nii.gz", "truncated")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@bad("A1 gzip without its last 8 bytes", "case_1_0000.nii.gz", "truncated")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.write_bytes(path.read_bytes()[:-8])


@bad("A2 .nii cut in the middle", "case_1_0000.nii", "truncated")
def _(folder: Path) -> None:
    volume_set(folder)
    for path in [*folder.glob("*/*.nii.gz")]:
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    describe(folder, file_ending=".nii")
    path = folder / "imagesTr" / "case_1_0000.nii"
    path.write_bytes(path.read_bytes()[:-300])


@bad("A3 one flipped bit", "case_1_0000.nii.gz")
def _(folder: Path) -> None:
    path = volume_set(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@bad("A3 a wrong checksum", "case_1_0000.nii.gz", "checksum")
def _(folder: Path) -> None:
    path = volume_set(folder)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


@bad("A5 empty file", "case_1_0000.nii.gz", "empty")
def _(folder: Path) -> None:
    volume_set(folder).write_bytes(b"")


@bad("A5 one byte", "case_1_0000.nii.gz")
def _(folder: Path) -> None:
    volume_set(folder).write_bytes(b"\x1f")


@bad("A5 a folder named like an image", "case_1_0000.nii.gz", "folder")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.unlink()
    path.mkdir()


@bad("A5 a pipe", "case_1_0000.nii.gz", "pipe")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.unlink()
    os.mkfifo(path)


@bad("A5 a dangling link", "case_1_0000.nii.gz", "link")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.unlink()
    path.symlink_to(folder / "nowhere.nii.gz")


@bad("A6 wrong magic", "case_1_0000.nii.gz", "Analyze")
def _(folder: Path) -> None:
    header(folder, 344, "4s", b"nope")  # type: ignore[arg-type]


@bad("A6 raw NIfTI named .nii.gz", "case_1_0000.nii.gz", "gzip")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.write_bytes(gzip.decompress(path.read_bytes()))


@bad("A6 a PNG named .nii.gz", "case_1_0000.nii.gz", "PNG")
def _(folder: Path) -> None:
    path = volume_set(folder)
    picture(np.zeros((9, 9), np.uint8), folder / "a.png")
    path.write_bytes((folder / "a.png").read_bytes())


@bad("A7 32767 cubed declared", "case_1_0000.nii.gz", "32767 x 32767 x 32767", code=5)
def _(folder: Path) -> None:
    header(folder, 40, "<4h", 3, 32767, 32767, 32767)


@bad("A8 gzip that unpacks to far more than declared", "case_1_0000.nii.gz")
def _(folder: Path) -> None:
    path = volume_set(folder)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(50_000_000)))


@bad("A9 a dimension of 0", "case_1_0000.nii.gz", "9 x 0 x 7")
def _(folder: Path) -> None:
    header(folder, 44, "<h", 0)


@bad("A9 a negative dimension", "case_1_0000.nii.gz", "9 x -8 x 7")
def _(folder: Path) -> None:
    header(folder, 44, "<h", -8)


@bad("A9 200 dimensions", "case_1_0000.nii.gz")
def _(folder: Path) -> None:
    header(folder, 40, "<h", 200)


@bad("A10 a NaN", "case_1_0000.nii.gz", "NaN")
def _(folder: Path) -> None:
    path = volume_set(folder)
    image = np.ones(SHAPE, np.float32)
    image[1, 2, 3] = np.nan
    save(image, path)


@bad("A10 all infinite", "case_1_0000.nii.gz", "infin")
def _(folder: Path) -> None:
    save(np.full(SHAPE, np.inf, np.float32), volume_set(folder))


@bad("A13 several frames", "case_1_0000.nii.gz", "frames")
def _(folder: Path) -> None:
    save(np.ones((*SHAPE, 4), np.int16), volume_set(folder))


@bad("A17 complex voxels", "case_1_0000.nii.gz", "complex64")
def _(folder: Path) -> None:
    save(np.ones(SHAPE, np.complex64), volume_set(folder))


@bad("A17 an unknown voxel type", "case_1_0000.nii.gz", "type code 777")
def _(folder: Path) -> None:
    header(folder, 70, "<h", 777)


@bad("A23 a singular affine", "case_1_0000.nii.gz", "singular")
def _(folder: Path) -> None:
    header(folder, 280, "<12f", *([0.0] * 12))


@bad("A23 NaN in the affine", "case_1_0000.nii.gz", "NaN")
def _(folder: Path) -> None:
    header(folder, 284, "<f", float("nan"))


@bad("A26 a spacing of 0", "case_1_0000.nii.gz")
def _(folder: Path) -> None:
    header(folder, 280, "<12f", 0, 0, 0, 5, 0, 1, 0, 7, 0, 0, 2, 9)


@bad("A28 another shape than the label's", "case_1", "9 x 8 x 6", "9 x 8 x 7")
def _(folder: Path) -> None:
    volume_set(folder)
    save(np.ones((9, 8, 6), np.uint8), label_of(folder))


@bad("A29 label shifted by 3 mm", "labelsTr/case_1.nii.gz", "3 mm", "--geometry-tol")
def _(folder: Path) -> None:
    volume_set(folder)
    moved = AFFINE.copy()
    moved[2, 3] += 3
    save(np.ones(SHAPE, np.uint8), label_of(folder), moved)


@bad("A29 label flipped left-right", "labelsTr/case_1.nii.gz", "axes run", "--trust-array-order")
def _(folder: Path) -> None:
    volume_set(folder)
    save(np.ones(SHAPE, np.uint8), label_of(folder), AFFINE * [[-1], [1], [1], [1]])


@bad("A29 label with another spacing", "labelsTr/case_1.nii.gz", "spacing")
def _(folder: Path) -> None:
    volume_set(folder)
    save(np.ones(SHAPE, np.uint8), label_of(folder), AFFINE @ np.diag([1, 1, 2, 1]))


@bad("A32 a channel file is missing", "imagesTr", "case_0", "0001")
def _(folder: Path) -> None:
    volume_set(folder)
    describe(folder, channel_names={"0": "T1", "1": "T2"})


@bad("A32 one channel file too many", "imagesTr", "case_1", "0001")
def _(folder: Path) -> None:
    path = volume_set(folder)
    save(np.ones(SHAPE, np.int16), path.with_name("case_1_0001.nii.gz"))


@bad("A36 an Analyze header", "case_1_0000.nii.gz", "pair")
def _(folder: Path) -> None:
    header(folder, 344, "4s", b"ni1\0")  # type: ignore[arg-type]


@bad("A37 an extension longer than the file", "case_1_0000.nii.gz")
def _(folder: Path) -> None:
    header(folder, 108, "<f", 5_000_000.0)


# C. pictures


@bad("C1 an image of unknown kind in the table", "dataset.csv", "images/1.xyz")
def _(folder: Path) -> None:
    table(folder, "image,label", "images/0.png,masks/0.png", "images/1.xyz,masks/1.png")


@bad("C6 masks in JPEG", "masks/1.jpg", "JPEG", "--lossy-labels 127")
def _(folder: Path) -> None:
    picture_set(folder)
    picture(np.zeros((24, 20), np.uint8), folder / "masks" / "1.jpg", quality=80)
    rows = [f"images/{n}.png,masks/{n}.{'jpg' if n == 1 else 'png'}" for n in range(4)]
    (folder / "dataset.csv").write_text("image,label\n" + "\n".join(rows))


@bad("C7 masks of 0 and 255, nothing declared", "0 and 255", "--map 255=1")
def _(folder: Path) -> None:
    picture_set(folder)
    for path in (folder / "masks").iterdir():
        picture(np.asarray(Image.open(path)) * 255, path)


@bad("C7 masks of 0 and 255 where 0 and 1 are declared", "masks/1.png", "255", "--map 255=1")
def _(folder: Path) -> None:
    picture_set(folder)
    (folder / "labels.json").write_text('{"background": 0, "lesion": 1}')
    picture(np.asarray(Image.open(folder / "masks" / "1.png")) * 255, folder / "masks" / "1.png")


@bad("C8 PNG cut in the middle", "images/1.png")
def _(folder: Path) -> None:
    path = picture_set(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@bad("C8 PNG without its end", "images/1.png")
def _(folder: Path) -> None:
    path = picture_set(folder)
    path.write_bytes(path.read_bytes()[:-10])


@bad("C8 flipped byte in a PNG", "images/1.png")
def _(folder: Path) -> None:
    path = picture_set(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@bad("C8 JPEG cut in the middle", "images/1.jpg")
def _(folder: Path) -> None:
    picture_set(folder)
    path = folder / "images" / "1.jpg"
    picture(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = [f"images/{n}.{'jpg' if n == 1 else 'png'},masks/{n}.png" for n in range(4)]
    (folder / "dataset.csv").write_text("image,label\n" + "\n".join(rows))


@bad("C10 a TIFF of several pages", "images/1.tif", "pages")
def _(folder: Path) -> None:
    picture_set(folder)
    pages = [Image.fromarray(np.zeros((24, 20), np.uint8)) for _ in range(3)]
    pages[0].save(folder / "images" / "1.tif", save_all=True, append_images=pages[1:])
    rows = [f"images/{n}.{'tif' if n == 1 else 'png'},masks/{n}.png" for n in range(4)]
    (folder / "dataset.csv").write_text("image,label\n" + "\n".join(rows))


@bad("C10 an animated GIF", "images/1.gif", "3 pictures")
def _(folder: Path) -> None:
    picture_set(folder)
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 255, (24, 20), dtype=np.uint8)) for _ in range(3)]
    pages[0].save(folder / "images" / "1.gif", save_all=True, append_images=pages[1:])
    rows = [f"images/{n}.{'gif' if n == 1 else 'png'},masks/{n}.png" for n in range(4)]
    (folder / "dataset.csv").write_text("image,label\n" + "\n".join(rows))


@bad("C11 one grey image among colours", "images/1.png", "1 channels", "3")
def _(folder: Path) -> None:
    picture(np.zeros((24, 20), np.uint8), picture_set(folder))


@bad("C13 a PNG that declares 1e9 x 1e9 pixels", "images/1.png", code=5)
def _(folder: Path) -> None:
    path = picture_set(folder)
    content = bytearray(path.read_bytes())
    struct.pack_into(">2I", content, 16, 2**30, 2**30)
    struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    path.write_bytes(content)


# D. labels and descriptions


@bad("D1 a label of 1.5", "labelsTr/case_1.nii.gz", "1.5")
def _(folder: Path) -> None:
    volume_set(folder)
    label = np.zeros(SHAPE, np.float32)
    label[2, 2, 2] = 1.5
    save(label, label_of(folder))


@bad("D2 an undeclared value", "labelsTr/case_1.nii.gz", "7 (2 voxels)")
def _(folder: Path) -> None:
    volume_set(folder)
    label = np.zeros(SHAPE, np.uint8)
    label[2, 2, 2:4] = 7
    save(label, label_of(folder))


@bad("D3 a negative label", "labelsTr/case_1.nii.gz", "-1")
def _(folder: Path) -> None:
    volume_set(folder)
    save(np.full(SHAPE, -1, np.int16), label_of(folder))


@bad("D5 no foreground at all", "no label file holds a foreground voxel")
def _(folder: Path) -> None:
    volume_set(folder)
    for path in (folder / "labelsTr").iterdir():
        save(np.zeros(SHAPE, np.uint8), path)


@bad("D9 no dataset.json", "dataset.json")
def _(folder: Path) -> None:
    volume_set(folder)
    (folder / "dataset.json").unlink()


@bad("D9 nothing there", "neither dataset.json nor a CSV file")
def _(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


@bad("D9 empty dataset.json", "dataset.json", "empty")
def _(folder: Path) -> None:
    volume_set(folder)
    (folder / "dataset.json").write_text("")


@bad("D9 trailing comma", "dataset.json", "line 1")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text(path.read_text()[:-1] + ",}")


@bad("D9 comments", "dataset.json", "line 2")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text("{\n// our data\n" + path.read_text()[1:])


@bad("D9 UTF-16", "dataset.json", "UTF-16")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text(path.read_text(), encoding="utf-16")


@bad("D10 a misspelt key", "dataset.json", "channel_name", "Did you mean")
def _(folder: Path) -> None:
    volume_set(folder)
    describe(folder, channel_names=None, channel_name={"0": "CT"})


@bad("D10 a wrong type", "dataset.json", "labels")
def _(folder: Path) -> None:
    volume_set(folder)
    describe(folder, labels=["background", "organ"])


@bad("D10 a key twice", "dataset.json", "twice")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text(path.read_text()[:-1] + ', "file_ending": ".nii"}')


@bad("D10 a misspelt file ending", "dataset.json", ".nii.zg", "Did you mean")
def _(folder: Path) -> None:
    volume_set(folder)
    describe(folder, file_ending=".nii.zg")


@bad("D10 no background", "dataset.json", "background")
def _(folder: Path) -> None:
    volume_set(folder)
    describe(folder, labels={"organ": 1})


@bad("D10 a misspelt column", "dataset.csv", "lable", "Did you mean 'lable'")
def _(folder: Path) -> None:
    table(folder, "image,lable", "images/0.png,masks/0.png")


@bad("D11 nested 5000 deep", "dataset.json")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text("[" * 5000 + "]" * 5000)


@bad("D11 a number of 5000 digits", "dataset.json")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text(path.read_text()[:-1] + ', "numTest": ' + "9" * 5000 + "}")


@bad("D11 NaN in JSON", "dataset.json", "NaN")
def _(folder: Path) -> None:
    path = volume_set(folder).parents[1] / "dataset.json"
    path.write_text(path.read_text()[:-1] + ', "numTest": NaN}')


@bad("D13 a path that climbs out", "../../etc", "outside", code=5)
def _(folder: Path) -> None:
    table(folder, "image,label", "../../etc/passwd,masks/0.png")


@bad("D13 an absolute path", "/etc", "outside", code=5)
def _(folder: Path) -> None:
    table(folder, "image,label", "/etc/passwd,masks/0.png")


@bad("D13 a URL", "https://example.org/a.png", code=5)
def _(folder: Path) -> None:
    table(folder, "image,label", "https://example.org/a.png,masks/0.png")


@bad("D13 missing files, all listed", "dataset.csv", "images/8.png", "masks/9.png")
def _(folder: Path) -> None:
    table(folder, "image,label", "images/8.png,masks/0.png", "images/1.png,masks/9.png")


@bad("D13 a loop of links", "images/1.png")
def _(folder: Path) -> None:
    path = picture_set(folder)
    path.unlink()
    path.symlink_to(path)


@bad("D17 no such data set", "no such folder", "Did you mean 'data'?")
def _(folder: Path) -> list[str]:
    volume_set(folder / "data")
    return ["check", str(folder / "dta")]


@bad("D18 no case", "no case")
def _(folder: Path) -> None:
    describe(folder)
    (folder / "imagesTr").mkdir()


@bad("D18 two cases", "2")
def _(folder: Path) -> None:
    volume_set(folder, num_cases=2)


@bad("D18 splits that name an unknown case", "case_8", "Did you mean")
def _(folder: Path) -> None:
    volume_set(folder)
    (folder / "splits_final.json").write_text('[{"train": ["case_0", "case_1"], "val": ["case_8"]}]')


# weights that are none (E23, G1)


@bad("E23 an empty weights file", "w.safetensors", "empty")
def _(folder: Path) -> list[str]:
    (folder / "w.safetensors").write_bytes(b"")
    return ["weights", "inspect", str(folder / "w.safetensors")]


@bad("E23 a web page named .pth", "w.pth", "web page")
def _(folder: Path) -> list[str]:
    (folder / "w.pth").write_text("<!DOCTYPE html><title>Sign in</title>")
    return ["weights", "inspect", str(folder / "w.pth")]


@bad("E23 weights cut off", "w.safetensors", "cut off")
def _(folder: Path) -> list[str]:
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", 300) + b'{"a": {')
    return ["weights", "inspect", str(folder / "w.safetensors")]


@bad("G1 a pickle that runs a command", "w.pth", "refused", code=5)
def _(folder: Path) -> list[str]:
    (folder / "w.pth").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    return ["weights", "inspect", str(folder / "w.pth")]
