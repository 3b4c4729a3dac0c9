"""Cases of DICOM scans: a folder, an archive or a file is one case per series."""

from pathlib import Path

from voxdino.core.errors import VoxdinoError
from voxdino.core.io import image_suffix
from voxdino.core.io.dicom import list_series
from voxdino.preparation.case import Case


def cases_of_scan(path: Path, *, series: str | None = None, name: str | None = None) -> list[Case]:
    """One case per series of images, called after the folder or file, with the series' number where it has several.

    series: only this one (its number or UID).   name: of the case in place of the path's own.
    Localizers count only where there is nothing else. A scan whose headers cannot be read is one case: it fails by name
    later. Empty where there is no DICOM image.
    """
    name = name or path.name.removesuffix(image_suffix(path) or (".zip" if path.is_file() else ""))
    if series is not None:
        return [Case(name, (path,), None, series=series)]
    try:
        found = list_series(path)
    except VoxdinoError:
        return [Case(name, (path,), None)]
    wanted = [one for one in found if not one.is_localizer] or found
    if len(wanted) == 1:
        return [Case(name, (path,), None, series=str(wanted[0].number))]
    return [Case(f"{name}_{one.number}", (path,), None, series=str(one.number)) for one in wanted]
