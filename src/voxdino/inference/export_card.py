"""export.json: all that a runner without torch has to know about an exported model."""

from pathlib import Path

from voxdino.core.errors import CheckpointError
from voxdino.core.records import Record
from voxdino.inference.postprocess import Postprocessing
from voxdino.inference.probe import Probe
from voxdino.preparation.plan import Plan

CARD_NAME = "export.json"
NETWORK_NAME = "model.onnx"
INPUT, OUTPUT = "image", "logits"


class ExportCard(Record):
    """What surrounds the network of model.onnx, which takes tiles `image` (B, C, D + 2 context, h, w), float32.

    It gives `logits` (B, K, D, h, w) before softmax (sigmoid for regions). B is free, and D where plan.slab > 1.
    plan:       before the network: orientation, in-plane spacing, intensities, tile, context; after it: labels, grid.
    clean_up:   what is done to the label map, class by class.
    run_digest: of the model that was exported.       probe: what it made of a drawn image.
    """

    name: str
    run_digest: str
    licence: str
    voxdino_version: str
    plan: Plan
    clean_up: Postprocessing
    probe: Probe
    format_version: int = 1

    @classmethod
    def of_folder(cls, folder: Path) -> "ExportCard":
        """Errors: CheckpointError for a folder of a later format."""
        card = cls.read(folder / CARD_NAME)
        if card.format_version != 1:
            fact = f"is of format {card.format_version}, this voxdino reads 1."
            raise CheckpointError(fact, where=folder / CARD_NAME, fix="use a newer voxdino, or export again.")
        return card


def is_export(folder: Path) -> bool:
    """Whether `voxdino export` wrote the folder."""
    return (folder / CARD_NAME).is_file()
