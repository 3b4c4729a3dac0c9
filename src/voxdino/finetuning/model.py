"""From a recipe and a plan to the model that a run trains."""

import inspect
from pathlib import Path

import torch

from voxdino.finetuning.config import FinetuneConfig
from voxdino.models.backbones.base import Backbone
from voxdino.models.compose import build_segmenter, sees_slab
from voxdino.models.decoders.tpa_sad import PUBLISHED_SCALES
from voxdino.models.precision import channels_last
from voxdino.models.registry import DECODERS, look_up
from voxdino.models.segmenter import DecoderSetting, ModelConfig, Segmenter
from voxdino.models.weights_card import WeightsCard
from voxdino.preparation.plan import Plan, set_by_user

SLAB = 16  # slices, as in DINO-Med3D (dossier 1.5)


def effective_plan(config: FinetuneConfig, plan: Plan) -> Plan:
    """The plan with what the recipe changes: slab, batch, magnification; the run folder keeps it.

    Of these the user's own `plan.NAME` stays as it is.
    """
    slab = config.slab or 1
    if sees_slab(config.decoder, config.detail, config.depth_adapter):
        slab = plan.slab if plan.slab > 1 or set_by_user(plan, "slab") else config.slab or SLAB
    if plan.ndim == 2:
        slab = 1
    batch = max(1, plan.batch_size // slab)
    if config.batch_size is not None and not set_by_user(plan, "batch_size"):
        batch = config.batch_size
    magnification = plan.magnification
    if not set_by_user(plan, "magnification"):
        magnification = round(magnification * config.magnification_scale, 3)
    why = {
        "slab": f"what the recipe {config.recipe} sees together.",
        "batch_size": f"what the recipe {config.recipe} trains with at once.",
        "magnification": f"{config.magnification_scale} times the planned {plan.magnification}, for {config.recipe}.",
    }
    changes = {"slab": slab, "batch_size": batch, "magnification": magnification}
    changed = {name for name, value in changes.items() if value != getattr(plan, name)}
    reasons = plan.reasons | {name: why[name] for name in changed}
    return plan.model_copy(update={**changes, "reasons": reasons})


def new_segmenter(
    config: FinetuneConfig, plan: Plan, backbone: Backbone, card: WeightsCard, device: torch.device
) -> Segmenter:
    """The model that a run trains, on its device. Errors: ConfigError for what does not go together."""
    segmenter = build_segmenter(model_config(config, plan, card.licence, device), backbone).to(device)
    channels_last(segmenter)
    return segmenter


def model_config(config: FinetuneConfig, plan: Plan, licence: str | None, device: torch.device) -> ModelConfig:
    """What `config` and `plan` mean for the model. plan: the effective one. licence: of the backbone's weights."""
    return ModelConfig(
        backbone=Path(config.backbone).name,  # no path of this machine in a file that is shared
        licence=licence,
        taps=config.taps,
        tap_norm=config.tap_norm,
        input_builder=plan.input_builder,
        context_slices=plan.context_slices,
        num_channels=len(plan.channels),
        decoder=config.decoder,
        decoder_width=config.decoder_width or (64 if device.type == "cpu" else None),
        pyramid_scales=config.pyramid_scales or _pyramid_scales(config, plan, device),
        decoder_settings=_decoder_settings(config, plan),
        adaptation=config.adaptation,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        last_k=config.last_k,
        drop_path=config.drop_path,
        rope_rescale=config.rope_rescale,
        gradient_checkpointing=config.gradient_checkpointing,
        detail=config.detail,
        detail_width=config.detail_width,
        depth_adapter=config.depth_adapter,
        slab=plan.slab,
        blank_features=config.blank_features,
        slices_at_once=config.slices_at_once,
        magnification=plan.magnification,
        num_outputs=plan.labels.num_outputs,
    )


def _decoder_settings(config: FinetuneConfig, plan: Plan) -> dict[str, DecoderSetting]:
    """As configured, with what follows from the plan: the crop a U-Net is built for, and a 3-D decoder's finest level.

    That is no finer than a voxel, or, before a detail stream, than the stream's coarsest map, four voxels wide: finer
    levels would cost most and could tell nothing.
    """
    kind = look_up(DECODERS, config.decoder, kind="decoder")
    read, planned = inspect.signature(kind).parameters, dict[str, DecoderSetting]()
    if "plan_size" in read:
        planned["plan_size"] = plan.crop if 2 in kind.num_dims else (plan.slab, *plan.crop)
        if 3 in kind.num_dims and plan.slice_spacing is not None and plan.in_plane_spacing is not None:
            planned["plan_spacing_mm"] = (plan.slice_spacing, *plan.in_plane_spacing)
    if "finest_scale" in read and not config.decoder_settings.get("release_kernels"):
        needed = plan.patch_size / plan.magnification / (1 if config.detail == "none" else 4)
        planned["finest_scale"] = next((scale for scale in (1, 2) if scale >= 0.75 * needed), 4)
    return planned | config.decoder_settings


def _pyramid_scales(config: FinetuneConfig, plan: Plan, device: torch.device) -> tuple[int, ...]:
    """The published 8, 4, 2, 1, halved until no level is finer than a prepared voxel; on a CPU 4, 2, 1, 1 at most.

    A level finer than a voxel would cost most and could tell nothing: hippocampus (magnified 3.6 times) trains 1.6
    times as fast with 4, 2, 1, 1 as with 4, 4, 2, 1 and reaches the same Dice. On a CPU the finest level is the price
    of the whole step: 192 x 256 pictures made 190 steps in five minutes with it. The first release's are its own.
    """
    if config.decoder_settings.get("pyramid") == "first_release":
        return PUBLISHED_SCALES
    voxels_per_token = plan.patch_size / plan.magnification
    most = 4 if device.type == "cpu" else 8
    finest = next((scale for scale in (1, 2, 4) if scale >= 0.9 * voxels_per_token), most)
    return tuple(max(1, scale * finest // 8) for scale in PUBLISHED_SCALES)
