"""What a prediction leaves behind: the label map in the format asked for, probabilities, a table of volumes."""

import csv
import io
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from voxdino.core.arrays import ARRAY_SUFFIX
from voxdino.core.errors import UsageError, VoxdinoError
from voxdino.core.io import read_grid
from voxdino.core.io.dicom_output import DicomOutput
from voxdino.core.io.writers import Origin, format_for, look_up_writer, require_writable, write_labels
from voxdino.core.labels import LabelSet
from voxdino.core.records import Record
from voxdino.core.safe_files import write_json, write_text
from voxdino.core.volume import LabelMap
from voxdino.preparation.case import Case

PROBABILITIES_SUFFIX = f".probabilities{ARRAY_SUFFIX}"
VOLUME_COLUMNS = ("case", "label", "volume", "unit")


class OutputSettings(Record):
    """What is written for each case.

    format:        one of `core.io.writers.WRITERS`; None: each image's own, DICOM SEG for DICOM.
    keep_patient:  copy the patient from DICOM images into DICOM output (see DicomOutput).
    probabilities: write the probabilities too (see `keep_probabilities`).
    """

    format: str | None = None
    keep_patient: bool = False
    probabilities: bool = False

    def format_of(self, case: Case) -> str:
        return self.format or format_for(case.images[0])

    def suffix_of(self, case: Case) -> str:
        return look_up_writer(self.format_of(case)).suffix

    def probabilities_file(self, output: Path, case: Case) -> Path | None:
        """CASE.probabilities.b2nd beside the label map; None where nobody asked."""
        if not self.probabilities:
            return None
        return output.with_name(output.name.removesuffix(self.suffix_of(case)) + PROBABILITIES_SUFFIX)


def output_to_score(cases: Sequence[Case], ndim: int) -> OutputSettings:
    """For label maps that a program scores: as usual, but NIfTI (2-D: PNG) in place of DICOM.

    A DICOM SEG may number its segments anew, and leaves out the slices in which there are none.
    """
    is_dicom = any(format_for(case.images[0]) == "dicom-seg" for case in cases)
    return OutputSettings(format=("nifti" if ndim == 3 else "png") if is_dicom else None)


def require_outputs(cases: Iterable[Case], output: OutputSettings) -> None:
    """Before any work, UsageError or GeometryError for the first case that the format cannot hold.

    A case whose header cannot be read is let through: predicting it will say what is wrong.
    """
    for case in cases:
        try:
            grid, _ = read_grid(case.images[0], series=case.series)
        except VoxdinoError:
            grid = None
        require_writable(output.format_of(case), case.images[0], grid)


def write_prediction(
    path: Path,
    labels: LabelMap,
    case: Case,
    output: OutputSettings,
    *,
    classes: LabelSet,
    model: tuple[str, str],
) -> None:
    """Write a case's label map to `path` in the format asked for.

    classes, model: what DICOM says was found, and by whom: name and digest.
    Errors: those of `write_labels`.
    """
    dicom = DicomOutput(model=model[0], version=model[1][:12], keep_patient=output.keep_patient)
    write_labels(output.format_of(case), path, labels, Origin(case.images[0], case.series, classes, dicom))


def require_volumes_file(path: str | PathLike[str]) -> None:
    """UsageError for a name that says no format of tables."""
    if Path(path).suffix.lower() not in (".csv", ".json"):
        raise UsageError("a table of volumes is .csv or .json.", where=path, fix="name it volumes.csv.")


def write_volumes(path: str | PathLike[str], volumes: Iterable[tuple[str, dict[str, float], str]]) -> None:
    """Write (case, label name -> volume, unit) as a table, one row per case and label; .csv or .json by the name.

    Errors: UsageError for another suffix, ResourceError.
    """
    require_volumes_file(path)
    rows: list[tuple[Any, ...]] = [
        (case, label, volume, unit) for case, found, unit in volumes for label, volume in found.items()
    ]
    if Path(path).suffix.lower() == ".json":
        write_json(path, [dict(zip(VOLUME_COLUMNS, row, strict=True)) for row in rows])
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(VOLUME_COLUMNS)
    writer.writerows(rows)
    write_text(path, text.getvalue())
