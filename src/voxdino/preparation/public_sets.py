"""PUBLIC_SETS: data sets that anybody may download, with their licences and the digests that were published.

Digests: of MedMNIST as its package prints them (record 10519652 at Zenodo), of the Medical Segmentation Decathlon as
MONAI prints them for the same files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from voxdino.core.archives import extract_tar, sweep_unpacking
from voxdino.core.download import download
from voxdino.core.errors import UsageError
from voxdino.core.locks import lock_folder
from voxdino.core.records import Record
from voxdino.core.safe_files import write_json
from voxdino.models.registry import look_up
from voxdino.preparation.classification import ClassNames

_GIB = 1 << 30
_ZENODO = "https://zenodo.org/records/10519652/files"
_MSD = "https://msd-for-monai.s3-us-west-2.amazonaws.com"


class PublicSet(Record):
    """One downloadable data set.

    checksum: "md5:...", as published.   max_gib: no file of it is larger, packed or unpacked.
    classes:  where the labels have an order, which the file does not say.
    """

    url: str
    checksum: str
    licence: str
    about: str
    source: str
    task: Literal["classification", "segmentation"]
    max_gib: float
    classes: ClassNames | None = None


class PulledSet(Record):
    """What `pull_set` left: the path to give to other commands, the checksum of what came, the number of files."""

    name: str
    path: str
    checksum: str
    licence: str
    num_files: int


def _medmnist(file: str, md5: str, about: str, *, licence: str = "CC BY 4.0", ordered: int = 0) -> PublicSet:
    classes = ClassNames(kind="ordinal", classes=tuple(map(str, range(ordered)))) if ordered else None
    return PublicSet(
        url=f"{_ZENODO}/{file}.npz?download=1",
        checksum=f"md5:{md5}",
        licence=licence,
        about=about,
        source="MedMNIST v2 (doi 10.1038/s41597-022-01721-8)",
        task="classification",
        max_gib=30 if "_" in file else 1,
        classes=classes,
    )


def _decathlon(task: str, md5: str, about: str) -> PublicSet:
    return PublicSet(
        url=f"{_MSD}/{task}.tar",
        checksum=f"md5:{md5}",
        licence="CC BY-SA 4.0",
        about=about,
        source="Medical Segmentation Decathlon (doi 10.1038/s41467-022-30695-9)",
        task="segmentation",
        max_gib=60,
    )


PUBLIC_SETS: dict[str, PublicSet] = {
    "pathmnist": _medmnist("pathmnist", "a8b06965200029087d5bd730944a56c1", "colon pathology, 9 classes"),
    "chestmnist": _medmnist("chestmnist", "02c8a6516a18b556561a56cbdd36c4a8", "chest X-ray, 14 findings"),
    "dermamnist": _medmnist(
        "dermamnist", "0744692d530f8e62ec473284d019b0c7", "dermoscopy, 7 classes", licence="CC BY-NC 4.0"
    ),
    "octmnist": _medmnist("octmnist", "c68d92d5b585d8d81f7112f81e2d0842", "retinal OCT, 4 classes"),
    "pneumoniamnist": _medmnist("pneumoniamnist", "28209eda62fecd6e6a2d98b1501bb15f", "chest X-ray, 2 classes"),
    "retinamnist": _medmnist("retinamnist", "bd4c0672f1bba3e3a89f0e4e876791e4", "fundus, 5 grades", ordered=5),
    "breastmnist": _medmnist("breastmnist", "750601b1f35ba3300ea97c75c52ff8f6", "breast ultrasound, 2 classes"),
    "bloodmnist": _medmnist("bloodmnist", "7053d0359d879ad8a5505303e11de1dc", "blood cells, 8 classes"),
    "tissuemnist": _medmnist("tissuemnist", "ebe78ee8b05294063de985d821c1c34b", "kidney cells, 8 classes"),
    "organamnist": _medmnist("organamnist", "68e3f8846a6bd62f0c9bf841c0d9eacc", "axial CT, 11 organs"),
    "organcmnist": _medmnist("organcmnist", "b9ceb9546e10131b32923c5bbeaea2b1", "coronal CT, 11 organs"),
    "organsmnist": _medmnist("organsmnist", "9ab87b696fb54e2a387ebe992d6ed5f1", "sagittal CT, 11 organs"),
    "organmnist3d": _medmnist("organmnist3d", "a0c5a1ff56af4f155c46d46fbb45a2fe", "CT volumes, 11 organs"),
    "nodulemnist3d": _medmnist("nodulemnist3d", "8755a7e9e05a4d9ce80a24c3e7a256f3", "CT nodules, 2 classes"),
    "adrenalmnist3d": _medmnist("adrenalmnist3d", "bbd3c5a5576322bc4cdfea780653b1ce", "adrenal shapes, 2 classes"),
    "fracturemnist3d": _medmnist("fracturemnist3d", "6aa7b0143a6b42da40027a9dda61302f", "rib fractures, 3 classes"),
    "vesselmnist3d": _medmnist("vesselmnist3d", "b41fd4f7e7e2feedddb201585ecafa1b", "vessel shapes, 2 classes"),
    "synapsemnist3d": _medmnist("synapsemnist3d", "1235b78a3cd6280881dd7850a78eadb6", "EM synapses, 2 classes"),
    "pneumoniamnist_224": _medmnist(
        "pneumoniamnist_224", "d6a3c71de1b945ea11211b03746c1fe1", "chest X-ray of 224 pixels, 2 classes"
    ),
    "breastmnist_224": _medmnist(
        "breastmnist_224", "b56378a6eefa9fed602bb16d192d4c8b", "breast ultrasound of 224 pixels, 2 classes"
    ),
    "retinamnist_224": _medmnist(
        "retinamnist_224", "eae7e3b6f3fcbda4ae613ebdcbe35348", "fundus of 224 pixels, 5 grades", ordered=5
    ),
    "dermamnist_224": _medmnist(
        "dermamnist_224", "8974907d8e169bef5f5b96bc506ae45d", "dermoscopy of 224 pixels", licence="CC BY-NC 4.0"
    ),
    "bloodmnist_224": _medmnist(
        "bloodmnist_224", "b718ff6835fcbdb22ba9eacccd7b2601", "blood cells of 224 pixels, 8 classes"
    ),
    "chestmnist_224": _medmnist(
        "chestmnist_224", "45bd33e6f06c3e8cdb481c74a89152aa", "chest X-ray of 224 pixels, 14 findings"
    ),
    "adrenalmnist3d_64": _medmnist(
        "adrenalmnist3d_64", "17721accfe9fb005146a47d33bc54b2f", "adrenal shapes of 64 voxels, 2 classes"
    ),
    "nodulemnist3d_64": _medmnist(
        "nodulemnist3d_64", "c47c5b7d457bf6332200d2ea6d64ecd8", "CT nodules of 64 voxels, 2 classes"
    ),
    "organmnist3d_64": _medmnist(
        "organmnist3d_64", "58a2205adf14a9d0a189cb06dc78bf10", "CT volumes of 64 voxels, 11 organs"
    ),
    "msd_brain_tumour": _decathlon("Task01_BrainTumour", "240a19d752f0d9e9101544901065d872", "MR, gliomas, 4 channels"),
    "msd_heart": _decathlon("Task02_Heart", "06ee59366e1e5124267b774dbd654057", "MR, left atrium"),
    "msd_liver": _decathlon("Task03_Liver", "a90ec6c4aa7f6a3d087205e23d4e6397", "CT, liver and tumours"),
    "msd_hippocampus": _decathlon("Task04_Hippocampus", "9d24dba78a72977dbd1d2e110310f31b", "MR, hippocampus"),
    "msd_prostate": _decathlon("Task05_Prostate", "35138f08b1efaef89d7424d2bcc928db", "MR, prostate zones, 2 channels"),
    "msd_lung": _decathlon("Task06_Lung", "8afd997733c7fc0432f71255ba4e52dc", "CT, lung tumours"),
    "msd_pancreas": _decathlon("Task07_Pancreas", "4f7080cfca169fa8066d17ce6eb061e4", "CT, pancreas and tumours"),
    "msd_hepatic_vessel": _decathlon(
        "Task08_HepaticVessel", "641d79e80ec66453921d997fbf12a29c", "CT, liver vessels and tumours"
    ),
    "msd_spleen": _decathlon("Task09_Spleen", "410d4a301da4e5b2f6f86ec3ddba524e", "CT, spleen"),
    "msd_colon": _decathlon("Task10_Colon", "bad7a188931dc2f6acf72b08eb6202d0", "CT, colon cancer"),
}


def pull_set(
    name: str, folder: Path, *, accept_licence: bool, on_progress: Callable[[int, int], None] | None = None
) -> PulledSet:
    """Download a set of the table into `folder`, check its digest, unpack it. Called again, it goes on or does nothing.

    A set of MedMNIST is the file NAME.npz; one of the Decathlon is unpacked beside its archive.
    Errors: UsageError for unknown names and a licence not accepted; those of downloading and unpacking.
    """
    found = look_up(PUBLIC_SETS, name, kind="data set")
    if not accept_licence:
        fact = f"is published under {found.licence} by {found.source}."
        raise UsageError(fact, where=name, fix="read that licence; if you agree, add --accept-licence.")
    file = folder / found.url.rpartition("/")[2].partition("?")[0]
    max_bytes = int(found.max_gib * _GIB)
    with lock_folder(folder):
        checksum = download(found.url, file, digest=found.checksum, max_bytes=max_bytes, on_progress=on_progress)
        path, num_files = file, 1
        if file.suffix == ".tar":
            path = folder / file.stem
            unpacked = folder / f"{file.stem}.unpacked"
            sweep_unpacking(folder)
            if unpacked.is_dir() and not any(unpacked.iterdir()):
                unpacked.rmdir()  # a kill came after its content was lifted
            if not path.is_dir():
                if not unpacked.is_dir():  # else it is whole: a kill came before it was lifted
                    extract_tar(file, unpacked, max_bytes=max_bytes)
                _lift(unpacked, path)
            num_files = sum(one.is_file() for one in path.rglob("*"))
        elif found.classes is not None:
            write_json(file.with_suffix(".json"), found.classes.to_json())
    return PulledSet(name=name, path=str(path), checksum=checksum, licence=found.licence, num_files=num_files)


def _lift(unpacked: Path, path: Path) -> None:
    """The archive's one folder, or all of it, under the set's name."""
    inside = list(unpacked.iterdir())
    if len(inside) == 1 and inside[0].is_dir():
        inside[0].rename(path)
        unpacked.rmdir()
    else:
        unpacked.rename(path)
