"""What reads the tokens in segmentation tasks: one linear layer fitted to the minimum, or a light decoder trained."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import voxdino
from voxdino.benchmark.encoders import Encoder
from voxdino.benchmark.grid import Cell
from voxdino.benchmark.kept import is_kept, kept
from voxdino.benchmark.segmentation import Fit, Model, SegmentationData
from voxdino.core.safe_files import digest_bytes, digest_json
from voxdino.core.volume import LabelMap, Volume
from voxdino.finetuning.recipes import RECIPES
from voxdino.finetuning.run import finetune
from voxdino.inference.load import LoadedModel, ModelCard, load_model
from voxdino.inference.predictor import predict_volume
from voxdino.models.backbones.base import Backbone
from voxdino.models.features import Features
from voxdino.models.precision import uses_bf16
from voxdino.models.segmenter import Segmenter
from voxdino.preparation.plan import Plan
from voxdino.probes.patches import PatchReader, PatchTokens, choose_probe_slices, fit_patches, patch_encoder
from voxdino.training.tracking import Event

FORMAT = 1  # raised when the meaning of kept tokens changes
TRAIN_SLICES = 150  # that a linear layer is fitted to
FIT_ITERATIONS = 60
DECODER_EPOCHS, DECODER_STEPS = 8, 40


class RememberingBackbone(Backbone):
    """A backbone that does not compute twice: within `case`, its answers are kept in a file, by the images' content.

    For one tap in eval mode: what lies between the encoder and the scores may change, the features are the same.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.depth, self.patch_size = backbone.config, backbone.depth, backbone.patch_size
        self._backbone = backbone
        self._known: dict[str, Tensor] = {}

    @contextmanager
    def case(self, path: Path | None) -> Iterator[None]:
        """Answers in the block are taken from the file, or go there when it ends well; None: they are not kept."""
        was_kept = path is not None and is_kept(path)
        self._known = kept(path, dict) if path is not None and was_kept else {}
        yield
        if path is not None and not was_kept:
            kept(path, lambda: self._known)

    def default_taps(self) -> tuple[int, ...]:
        return self._backbone.default_taps()

    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        return self._backbone.embed_dims(taps)

    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        return self._backbone.tail(num_parts)

    def level(self, name: str) -> int:
        return self._backbone.level(name)

    def forward(
        self,
        images: Float[Tensor, "B P H W"],
        *,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        key = digest_bytes(images.detach().cpu().contiguous().numpy().tobytes())[:24]
        if key not in self._known:
            found = self._backbone(images, taps=taps, tap_norm=tap_norm, images_at_once=images_at_once)
            self._known |= {key: found.maps[0].half().cpu(), f"{key}.cls": found.cls_token.half().cpu()}
        tokens, class_token = (self._known[name].to(images.device).float() for name in (key, f"{key}.cls"))
        return Features((tokens,), class_token, (self.patch_size, self.patch_size))


def patch_linear(data: SegmentationData, cell: Cell, encoder: Encoder) -> Model:
    """One linear layer on the tokens of the last block, fitted to the minimum: what the features alone know.

    Up to 150 training slices, four of five with foreground; its penalty chosen on a fifth of the training cases.
    """
    magnification = data.magnification(encoder, cell.resolution)
    plan = data.plan.model_copy(update={"magnification": magnification})
    backbone = RememberingBackbone(encoder.load().to(data.device)).eval()
    segmenter = (
        patch_encoder(plan, backbone, num_outputs=data.classes("patch_linear").num_outputs).to(data.device).eval()
    )
    folder = data.folder / "tokens" / digest_json([FORMAT, encoder.card.file_digest, data.digest, magnification])[:20]
    cases = _drawn((*data.split(cell.site)[0].train, *data.split(cell.site)[0].val), cell)
    layer = fit_patches(_tokens(data, plan, segmenter, cases, folder), max_iterations=FIT_ITERATIONS)
    weights, biases = layer.of_raw_tokens()
    to_logits = segmenter.decoder.to_logits
    assert isinstance(to_logits, nn.Linear)
    with torch.no_grad():
        to_logits.weight.copy_(weights)
        to_logits.bias.copy_(biases)
    loaded = _loaded(segmenter, plan, encoder, data)

    def predict(name: str, volume: Volume, keep: bool) -> LabelMap:
        with backbone.case(folder / f"{digest_json(name)[:20]}.safetensors" if keep else None):
            return predict_volume(loaded, volume, case=name)

    return Model(
        predict=predict,
        validation=layer.held_out_dice,
        num_train=len(cases),
        settings={"side": encoder.side(cell.resolution), "magnification": magnification, "strength": layer.strength},
    )


def decoder(recipe: str) -> Fit:
    """A decoder trained on frozen features by a recipe of `voxdino finetune`, 320 steps; see there for what it is."""

    def fit(data: SegmentationData, cell: Cell, encoder: Encoder) -> Model:
        magnification = data.magnification(encoder, cell.resolution)
        config = RECIPES[recipe]().model_copy(
            update={
                "backbone": encoder.source,
                "magnification_scale": magnification / data.plan.magnification,
                "num_epochs": DECODER_EPOCHS,
                "steps_per_epoch": DECODER_STEPS,
                "cached_views": 1,
                "num_train_cases": cell.shots,
                "seed": cell.seed,
            }
        )
        run = data.folder / "runs" / digest_json([config.to_json(), data.digest, data.ids(cell.site)])[:20]
        fold = data.sites.index(cell.site)
        summary = finetune(data.folder, config, run_folder=run, fold=fold, device=data.device.type, on_event=_silent)
        model = load_model(run, data.device)
        shutil.rmtree(run)  # the backbone is in there too; the features that it was trained on are kept
        num_train = len(data.split(cell.site)[0].train)
        return Model(
            predict=lambda name, volume, keep: predict_volume(model, volume, case=name),
            validation=summary.best_dice,
            num_train=num_train if cell.shots is None else min(num_train, cell.shots),
            settings={"side": encoder.side(cell.resolution), "magnification": magnification, "step": summary.best_step},
        )

    return fit


def _silent(event: Event) -> None:
    """Progress of a decoder is not told; the benchmark tells its own."""


def _drawn(cases: Sequence[str], cell: Cell) -> list[str]:
    """The cell's training cases; more of the same seed hold the fewer."""
    order = np.random.default_rng([cell.seed, 12]).permutation(len(cases))
    return sorted(cases[place] for place in order[: cell.shots])


def _tokens(
    data: SegmentationData, plan: Plan, segmenter: Segmenter, cases: Sequence[str], folder: Path
) -> PatchTokens:
    """Of the slices to fit to, kept on disk."""
    bf16 = uses_bf16(data.device, "auto")
    reader = PatchReader(data.store, plan, segmenter, len(plan.labels.names), 1.0, 16, bf16)

    def make() -> dict[str, Tensor]:
        read = reader(cases, TRAIN_SLICES)
        return {"tokens": read.tokens, "shares": read.shares, "label": read.label}

    found = kept(folder / f"train_{digest_json(list(cases))[:20]}.safetensors", make)
    slices = choose_probe_slices([data.store.extent(case) for case in cases], TRAIN_SLICES)
    return PatchTokens(
        found["tokens"].float(), found["shares"].float(), found["label"], tuple(case for case, _ in slices)
    )


def _loaded(segmenter: Segmenter, plan: Plan, encoder: Encoder, data: SegmentationData) -> LoadedModel:
    licence = encoder.card.licence
    card = ModelCard(
        model=segmenter.config, backbone=encoder.card, licence=licence, voxdino_version=voxdino.__version__
    )
    return LoadedModel(segmenter, plan, card, encoder.name, encoder.card.file_digest, data.device)
