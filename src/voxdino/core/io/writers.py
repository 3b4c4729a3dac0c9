"""How label maps leave: one table from format to writer, and which format suits which image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from voxdino.core.errors import GeometryError, UsageError
from voxdino.core.geometry import Grid
from voxdino.core.io import image_suffix, write_label_map
from voxdino.core.io.dicom_output import DicomOutput
from voxdino.core.labels import LabelSet
from voxdino.core.records import nearest
from voxdino.core.volume import LabelMap

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from voxdino.core.io.write_seg import Encoding


@dataclass(frozen=True)
class Origin:
    """What a label map was made from.

    image:   the file or folder that it belongs to; NIfTI takes its header, DICOM refers to it.
    series:  which one, where the image holds several (see ReadOptions).
    classes: the names of the labels, for DICOM.
    """

    image: Path | None = None
    series: str | None = None
    classes: LabelSet | None = None
    dicom: DicomOutput = field(default_factory=DicomOutput)


@dataclass(frozen=True)
class Writer:
    """How one format is written.

    suffix:      of its files.
    ndims:       numbers of axes that it holds.
    needs_dicom: whether the image must be DICOM, because the file refers to it.
    """

    suffix: str
    ndims: tuple[int, ...]
    needs_dicom: bool
    write: Callable[[Path, LabelMap, Origin], None]


def _write_image(path: Path, labels: LabelMap, origin: Origin) -> None:
    write_label_map(path, labels, like=origin.image)


def _write_segmentation(path: Path, labels: LabelMap, origin: Origin, encoding: "Encoding" = "auto") -> None:
    from voxdino.core.io import write_seg

    write_seg.write(path, labels, _headers(origin), origin.classes, origin.dicom, encoding)


def _write_structures(path: Path, labels: LabelMap, origin: Origin) -> None:
    from voxdino.core.io import write_rtstruct

    write_rtstruct.write(path, labels, _headers(origin), origin.classes, origin.dicom)


def _headers(origin: Origin) -> "Sequence[Dataset]":
    from voxdino.core.io.dicom import source_files
    from voxdino.core.io.dicom_target import read_headers

    assert origin.image is not None, "require_writable lets no DICOM format through without an image"
    return read_headers(source_files(origin.image, origin.series), keep_patient=origin.dicom.keep_patient)


WRITERS: dict[str, Writer] = {
    "nifti": Writer(".nii.gz", (3,), False, _write_image),
    "nii": Writer(".nii", (3,), False, _write_image),
    "nrrd": Writer(".nrrd", (3,), False, _write_image),
    "mha": Writer(".mha", (3,), False, _write_image),
    "png": Writer(".png", (2,), False, _write_image),
    "dicom-seg": Writer(".seg.dcm", (2, 3), True, _write_segmentation),
    "dicom-seg-binary": Writer(".seg.dcm", (2, 3), True, partial(_write_segmentation, encoding="binary")),
    "dicom-seg-labelmap": Writer(".seg.dcm", (2, 3), True, partial(_write_segmentation, encoding="labelmap")),
    "rtstruct": Writer(".rtstruct.dcm", (3,), True, _write_structures),
}

# pictures become .png, which holds labels without loss; headers with a data file beside them become one file
_FORMAT_OF = {".nii.gz": "nifti", ".nii": "nii", ".nrrd": "nrrd", ".nhdr": "nrrd", ".mha": "mha", ".mhd": "mha"}
_FORMAT_OF |= dict.fromkeys((".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".gif"), "png")


def format_for(image: str | PathLike[str]) -> str:
    """The format in which the label map of this image is written where nobody asks for another: the image's own.

    Pictures become PNG. Whatever is none of the other formats is DICOM, and becomes a DICOM SEG.
    """
    return _FORMAT_OF.get(image_suffix(image), "dicom-seg")


def look_up_writer(name: str) -> Writer:
    """The writer of a format. Errors: UsageError with the nearest name."""
    if name not in WRITERS:
        raise UsageError(f"unknown format '{name}'.{nearest(name, WRITERS)}", fix=f"known: {', '.join(WRITERS)}.")
    return WRITERS[name]


def case_of_output(path: Path) -> str:
    """The case that a label map is named after: its name without the suffix, also where that is .seg.dcm."""
    written = (writer.suffix for writer in WRITERS.values() if path.name.endswith(writer.suffix))
    return path.name.removesuffix(max(written, key=len, default=image_suffix(path)))


def require_writable(name: str, image: str | PathLike[str], grid: Grid | None) -> None:
    """Check, before any work, that the label map of an image can be written in a format. grid: None where unknown.

    Errors: UsageError for a DICOM format and an image that is none; GeometryError for a volume as PNG, a picture as
    anything in space.
    """
    writer = look_up_writer(name)
    if writer.needs_dicom and format_for(image) != "dicom-seg":
        fact = f"is no DICOM image, so a {name} file has nothing to refer to."
        raise UsageError(fact, fix=f"write --format {format_for(image)}.", where=image)
    if grid is not None and grid.ndim not in writer.ndims:
        what, fix = ("a volume", "nifti") if grid.ndim == 3 else ("a picture", "png")
        raise GeometryError(f"is {what}, which {name} cannot hold.", where=image, fix=f"write --format {fix}.")


def require_referable(name: str, origin: Origin) -> None:
    """Check, before any work, that a DICOM format finds the UIDs that it refers to. Errors: ImageError."""
    if look_up_writer(name).needs_dicom:
        from voxdino.core.io.dicom import missing_reference
        from voxdino.core.io.dicom_target import no_reference

        assert origin.image is not None, "require_writable lets no DICOM format through without an image"
        missing = missing_reference(origin.image, origin.series)
        if missing:
            raise no_reference(missing)


def write_labels(name: str, path: str | PathLike[str], labels: LabelMap, origin: Origin | None = None) -> None:
    """Write a label map (*spatial, file ids) atomically in a format of WRITERS.

    Errors: those of `require_writable` and of the writer.
    """
    origin = origin or Origin()
    require_writable(name, path if origin.image is None else origin.image, labels.grid)
    look_up_writer(name).write(Path(path), labels, origin)
