"""`voxdino check SCAN`: the series in a folder, archive or file of DICOM, and what keeps one from being read."""

from pathlib import Path

from voxdino.cli.output import end


def list_scan(path: Path, *, as_json: bool) -> bool:
    """Print the series of a scan, one a line. False, and nothing printed, where there is no DICOM image."""
    from voxdino.core.errors import ImageError
    from voxdino.core.io.dicom import list_series

    found = list_series(path) if path.is_dir() or path.is_file() else ()
    if not found:
        return False
    if not as_json:
        for one in found:
            print(f"series {one.describe()}{f': {one.problem}' if one.problem else ''}")
    facts = ("number", "modality", "num_files", "is_localizer", "size", "spacing", "unit", "problem")
    error = None
    if all(one.problem for one in found):
        error = ImageError(found[0].problem, where=path, fix="export the series again.")
    end({"series": [{name: getattr(one, name) for name in facts} for one in found]}, error, as_json=as_json)
    return True
