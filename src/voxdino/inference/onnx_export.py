"""From a run folder to an exported one: the network as ONNX, and export.json with all that surrounds it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

import voxdino
from voxdino.core.errors import ResourceError, UsageError
from voxdino.core.safe_files import MANIFEST_NAME, Manifest, write_atomic
from voxdino.inference.export_card import CARD_NAME, INPUT, NETWORK_NAME, OUTPUT, ExportCard
from voxdino.inference.load import LoadedModel, load_model
from voxdino.inference.onnx_model import load_export
from voxdino.inference.postprocess import Postprocessing
from voxdino.inference.probe import Probe, probe_crop
from voxdino.models.segmenter import Segmenter

_OWN_FILES = {CARD_NAME, NETWORK_NAME, MANIFEST_NAME}
_MOST_BYTES = 1_900_000_000  # a protocol buffer holds 2 GiB


class _Logits(nn.Module):
    """A segmenter that gives a bare tensor."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.segmenter(image).logits
        return logits.float()


def export_model(run_folder: Path, out_folder: Path) -> ExportCard:
    """Write model.onnx, export.json and the manifest that makes them an export; then load and probe it.

    Errors: UsageError for a folder that holds something else; ResourceError without the exporter's packages;
    CheckpointError for a run folder that is no model, or where ONNX Runtime gives other logits than torch.
    """
    strangers = {path.name for path in out_folder.iterdir()} - _OWN_FILES if out_folder.is_dir() else set()
    if strangers:
        fact = f"holds other files, such as {min(strangers)}."
        raise UsageError(fact, where=out_folder, fix="give a new folder.")
    _require_packages()
    model = load_model(run_folder)
    crop = probe_crop(model.plan)
    with torch.inference_mode():
        logits = model.segmenter(torch.from_numpy(crop)).logits.float()
    card = ExportCard(
        name=model.name,
        run_digest=model.digest,
        licence=model.licence,
        voxdino_version=voxdino.__version__,
        plan=model.plan,
        clean_up=Postprocessing.of_run(run_folder),
        probe=Probe.of(crop, logits.numpy()),
    )
    (out_folder / MANIFEST_NAME).unlink(missing_ok=True)
    write_network(model, torch.from_numpy(crop), out_folder / NETWORK_NAME)
    card.write(out_folder / CARD_NAME)
    Manifest.of(out_folder, (CARD_NAME, NETWORK_NAME)).write(out_folder)
    load_export(out_folder, device="cpu")
    return card


def write_network(model: LoadedModel, crop: Float[Tensor, "1 C Dk h w"], path: Path) -> None:
    """model.onnx, made from a tile; the number of tiles stays free, and of slices where the model sees slabs."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.segmenter.state_dict().values())
    if num_bytes > _MOST_BYTES:
        raise UsageError(f"the model's {num_bytes / 1e9:.1f} GB do not fit into one ONNX file", fix="export a smaller.")
    free = {0: torch.export.Dim.DYNAMIC}
    if model.plan.slab > 1:
        free[2] = torch.export.Dim.DYNAMIC
    example = torch.cat((crop, crop))  # of one, the exporter would take the one for a constant
    network = _Logits(model.segmenter).eval()
    with _quiet(), torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=(free,), strict=True)
        exported = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False
        )
        assert exported is not None
        with write_atomic(path) as temporary:
            exported.save(str(temporary), external_data=False)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401  # all that torch.onnx and the check afterwards will ask for
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        fact = f"exporting needs onnx, onnxscript and onnxruntime ({error})."
        raise ResourceError(fact, fix="pip install 'voxdino[export]'.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter tells its own developers is nothing for a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
