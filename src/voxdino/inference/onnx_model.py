"""An exported model, run by ONNX Runtime: needs no torch, and makes the label maps that torch makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from voxdino.core.errors import CheckpointError, ResourceError, UsageError
from voxdino.core.geometry import Grid
from voxdino.core.safe_files import Manifest, digest_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.inference.export_card import CARD_NAME, INPUT, NETWORK_NAME, OUTPUT, ExportCard
from voxdino.inference.memory import working_bytes
from voxdino.inference.numpy_engine import segment
from voxdino.inference.postprocess import Postprocessing
from voxdino.inference.probe import probe_crop
from voxdino.inference.settings import PredictSettings
from voxdino.preparation.plan import Plan

_AT_ONCE = {"CPUExecutionProvider": 2, "OpenVINOExecutionProvider": 2}  # few stay in its cache
_AT_ONCE_ON_GPU = 32
_PROVIDERS = {"cpu": ("OpenVINOExecutionProvider",), "cuda": ("CUDAExecutionProvider",)}


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """See `Segmenting`. session: of ONNX Runtime; name: of the exported folder; after: cleaning up."""

    session: Any
    card: ExportCard
    name: str
    digest: str
    after: Postprocessing

    @property
    def plan(self) -> Plan:
        return self.card.plan

    @property
    def licence(self) -> str:
        return self.card.licence

    @property
    def who(self) -> tuple[str, ...]:
        return (f"{self.name} on ONNX Runtime's {self.provider} ({self.licence})",)

    @property
    def magnifies(self) -> bool:
        return False

    @property
    def provider(self) -> str:
        """What computes: CPUExecutionProvider, OpenVINOExecutionProvider, CUDAExecutionProvider."""
        return str(self.session.get_providers()[0])

    def working_bytes(self, grid: Grid, settings: PredictSettings) -> int:
        """See `Segmenting`."""
        return working_bytes([(self.plan, self.plan.labels.num_outputs + 1)], grid)

    def segment(
        self, volume: Volume, settings: PredictSettings, *, case: str, probabilities: Path | None = None
    ) -> LabelMap:
        """The label map of a volume, cleaned up. Errors: as `predict_volume`; UsageError for what needs torch."""
        without = {
            "a second look": settings.second_look,
            "bfloat16": settings.amp == "bf16",
            "keeping probabilities": probabilities,
        }
        for wanted in [name for name, asked in without.items() if asked]:
            raise UsageError(f"{wanted} needs torch, this model is exported", fix="predict with the run folder.")
        at_once = settings.slices_at_once or _AT_ONCE.get(self.provider, _AT_ONCE_ON_GPU)
        labels = segment(self.network, self.plan, volume, settings, case=case, slices_at_once=at_once)
        return self.after.apply(labels, self.plan.labels)

    def network(self, image: Float[np.ndarray, "B C Dk h w"]) -> Float[np.ndarray, "B K D h w"]:
        """Logits of tiles."""
        return np.asarray(self.session.run([OUTPUT], {INPUT: image})[0])


def load_export(folder: Path, *, clean_up: bool = True, device: str = "auto") -> OnnxModel:
    """The model of a folder that `voxdino export` wrote.

    device: "auto" takes a GPU where ONNX Runtime has one; on the CPU, OpenVINO where its package is there.
    Errors: CheckpointError where a file is missing or damaged, or the probe comes out otherwise; ResourceError
    without ONNX Runtime, or for a device it does not have.
    """
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    if not {CARD_NAME, NETWORK_NAME} <= set(manifest.files):
        raise CheckpointError("is no complete export.", where=folder, fix="export the model again.")
    card = ExportCard.of_folder(folder)
    model = OnnxModel(
        session=open_session(folder / NETWORK_NAME, device),
        card=card,
        name=folder.resolve().name,
        digest=digest_json({name: digest for name, (digest, _) in manifest.files.items()}),
        after=card.clean_up if clean_up else Postprocessing(),
    )
    crop = probe_crop(card.plan)
    card.probe.require_same(crop, model.network(crop), folder)
    return model


def open_session(path: Path, device: str = "auto") -> Any:
    """A session of ONNX Runtime. Errors: ResourceError without it, or for a device it does not have."""
    try:
        import onnxruntime
    except ImportError as error:
        fact = f"exported models are run by ONNX Runtime, which is not here ({error})."
        raise ResourceError(fact, fix="pip install 'voxdino[onnx]' (on a GPU: onnxruntime-gpu).") from error
    kinds = ("cuda", "cpu") if device == "auto" else (device,)
    there = onnxruntime.get_available_providers()
    chosen = [name for kind in kinds for name in _PROVIDERS.get(kind, ()) if name in there]
    if not chosen and device not in ("auto", "cpu"):
        fix = "use --device cpu, or install onnxruntime-gpu."
        raise ResourceError(f"ONNX Runtime has no {device} device here.", where="--device", fix=fix)
    onnxruntime.set_default_logger_severity(3)  # errors only
    return onnxruntime.InferenceSession(str(path), providers=[*chosen, "CPUExecutionProvider"])
