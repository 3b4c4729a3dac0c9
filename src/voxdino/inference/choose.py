"""From folders to what predicts: run folders need torch, exported ones do not."""

from collections.abc import Sequence
from pathlib import Path

from voxdino.core.errors import UsageError
from voxdino.core.safe_files import read_json
from voxdino.inference.export_card import ExportCard, is_export
from voxdino.inference.segmenting import Announced
from voxdino.preparation.plan import Plan


def load_segmenting(
    folders: Sequence[Path], *, localise: Path | None = None, clean_up: bool = True, device: str = "auto"
) -> Announced:
    """The models of run folders, or the one of an exported folder.

    Errors: CheckpointError for a folder that is no complete model; UsageError for models that do not go together.
    """
    if not any(is_export(folder) for folder in folders):
        from voxdino.inference.team import load_team
        from voxdino.models.precision import resolve_device

        return load_team(folders, localise=localise, clean_up=clean_up, device=resolve_device(device))
    if len(folders) > 1 or localise is not None:
        fix = "predict with the run folders themselves."
        raise UsageError("an exported model works alone: it neither votes nor is guided", where="--run", fix=fix)
    from voxdino.inference.onnx_model import load_export

    return load_export(folders[0], clean_up=clean_up, device=device)


def plan_of(folder: Path) -> Plan:
    """The plan of a run folder or an exported one, without loading the model."""
    if is_export(folder):
        return ExportCard.of_folder(folder).plan
    from voxdino.inference.load import load_plan

    return load_plan(folder)


def is_classifier(run_folder: Path) -> bool:
    """Whether the folder's model.json is one of a classifier."""
    path = run_folder / "model.json"
    value = read_json(path) if path.is_file() else None
    return isinstance(value, dict) and "classes" in value
