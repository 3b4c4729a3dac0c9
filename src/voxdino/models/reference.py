"""Does this installation compute what the authors' code computes? Stored inputs, weights and outputs, compared.

A case is NAME.safetensors (tensors `input.*`, `weights.*`, `output.*`) with NAME.json (what it is). A new case that we
have code for is one function and one line in CASES.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxdino.core.errors import InputError
from voxdino.core.safe_files import read_json
from voxdino.models.backbones.build import backbone_from_state
from voxdino.models.backbones.convnext import ConvNeXt
from voxdino.models.backbones.vit import ViT
from voxdino.models.decoders.primus import PrimusDecoder, from_meddinov3_decoder
from voxdino.models.decoders.segdino_v1 import SegdinoV1Decoder, from_segdino_v1
from voxdino.models.decoders.tpa_sad import TpaSadDecoder, from_segdino_v2
from voxdino.models.decoders.upernet3d import Upernet3dDecoder, from_dinomed3d_stage2
from voxdino.models.detail import DetailStream, Refinement
from voxdino.models.features import Features
from voxdino.models.layouts import convert
from voxdino.models.weights import read_tensors

Case = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Iterator[tuple[Tensor, Tensor]]]
_DEFAULT_TOLERANCE = 1e-5
# MedDINOv3 rounds queries and keys to bfloat16: some fall to the neighbouring value by a processor's last float32 bit.
# Of 200 inputs changed by 1e-7 none ended above 1.1e-3; rotating in float32 instead ends at 1.7e-2.
_TOLERANCES = {"dinomed3d_stage2_head": 1e-4, "meddinov3_vit": 3e-3, "metrics": 1e-6}
_NORM_EPS = {"layernorm": "1e-6", "layernormbf16": "1e-5"}
_ROPE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ReferenceResult:
    """One case: the largest absolute difference over all its outputs, or why it was not computed."""

    name: str
    largest_error: float | None
    tolerance: float
    passed: bool
    skipped_reason: str | None = None


def check_reference_values(folder: Path, cases: Mapping[str, Case] | None = None) -> list[ReferenceResult]:
    """Compute every case of a folder that there is code for; the others are listed as skipped.

    cases: the code, by name; default: CASES, the models alone.
    Errors: InputError for a folder without cases, WeightsError for damaged ones.
    """
    names = sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".safetensors").is_file())
    if not names:
        fix = "give the folder of NAME.json and NAME.safetensors files."
        raise InputError("holds no reference cases", where=folder, fix=fix)
    return [_check(folder, name, CASES if cases is None else cases) for name in names]


@torch.no_grad()
def _check(folder: Path, name: str, cases: Mapping[str, Case]) -> ReferenceResult:
    tolerance = _TOLERANCES.get(name, _DEFAULT_TOLERANCE)
    if name not in cases:
        return ReferenceResult(name, None, tolerance, False, "not built yet")
    tensors, _ = read_tensors(folder / f"{name}.safetensors")
    pairs = cases[name](tensors, read_json(folder / f"{name}.json"))
    errors = torch.stack([(ours - theirs).abs().max().double() for ours, theirs in pairs])
    largest = float(errors.max())  # NaN stays NaN, and never passes
    return ReferenceResult(name, largest, tolerance, largest <= tolerance)


def _official_vit(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    config = facts["config"]
    settings = {
        "norm_eps": _NORM_EPS[config["norm_layer"]],
        "rope_dtype": _ROPE_DTYPES[config["pos_embed_rope_dtype"]],
    }
    vit = _build_vit(tensors, settings=settings)
    images = tensors["input"]
    tokens, masked = vit.tokens(images), vit.tokens(images, masks=tensors["mask"])
    yield tokens.cls, tensors["output.cls"]
    yield tokens.registers, tensors["output.registers"]
    yield tokens.patches, tensors["output.patches"]
    yield masked.cls, tensors["output.masked_cls"]
    yield masked.patches, tensors["output.masked_patches"]
    for tap_norm, stem in ((True, "tap"), (False, "rawtap")):
        maps = vit(images, taps=range(vit.depth), tap_norm=tap_norm).maps
        for index, ours in enumerate(maps):
            yield ours, tensors[f"output.{stem}{index}"]


def _timm_vit(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    vit = _build_vit(tensors, settings={"num_heads": str(facts["config"]["num_heads"])})
    yield _all_tokens(vit, tensors["input"]), tensors["output.tokens"]


def _hugging_face_vit(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    vit = _build_vit(tensors, hub_config=facts["config"])
    tokens = _all_tokens(vit, tensors["input"])
    yield tokens, tensors["output.last_hidden_state"]
    yield tokens[:, 0], tensors["output.pooler_output"]


def _segdino_v1(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    features = _tap_features(tensors, facts)
    decoder = SegdinoV1Decoder(
        embed_dims=tuple(one.shape[1] for one in features.maps),
        num_outputs=int(facts["num_classes"]),
        decoder_width=int(facts["features"]),
        projections=tuple(facts["out_channels"]),
        head_form="release",
    )
    decoder.load_state_dict(from_segdino_v1(_weights(tensors)))
    yield decoder.native_logits(features), tensors["output.decoder"]
    yield decoder(features), tensors["output.logits"]


def _meddinov3(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    features = _tap_features(tensors, facts)
    embed_dims = tuple(one.shape[1] for one in features.maps)
    decoder = PrimusDecoder(embed_dims=embed_dims, num_outputs=int(facts["num_classes"]))
    decoder.load_state_dict(from_meddinov3_decoder(_weights(tensors)))
    yield decoder(features), tensors["output.logits"]


def _tap_features(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Features:
    """Four stored taps, as tokens (B, N, E) or as maps, as Features."""
    taps = [tensors[f"input.tap{i}"] for i in range(4)]
    maps = tuple(t.transpose(1, 2).reshape(*t.shape[::2], *facts["grid"]) if t.ndim == 3 else t for t in taps)
    return Features(maps, maps[-1].mean(dim=(2, 3)), (16, 16))


def _convnext(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    state = convert(_weights(tensors))
    convnext = backbone_from_state(state.config, state.tensors)
    assert isinstance(convnext, ConvNeXt)
    images = tensors["input"]
    stages, features = list(convnext.stage_maps(images)), convnext(images)
    tokens = convnext.norm(stages[-1].flatten(2).transpose(1, 2))  # (B, N, E)
    yield features.cls_token, tensors["output.cls"]
    yield tokens, tensors["output.patches"]
    stages[-1] = tokens.transpose(1, 2).reshape(stages[-1].shape)
    for index, ours in enumerate(stages):
        yield ours, tensors[f"output.stage{index}"]


def _segdino_v2(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    features = _tap_features(tensors, facts)
    embed_dims = tuple(one.shape[1] for one in features.maps)
    decoder = TpaSadDecoder(
        embed_dims=embed_dims, num_outputs=int(facts["num_classes"]), decoder_width=int(facts["channels"])
    )
    decoder.load_state_dict(from_segdino_v2(_weights(tensors)))
    yield decoder.native_logits(features), tensors["output.decoder"]
    yield decoder(features), tensors["output.logits"]


def _dinomed3d(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    state = from_dinomed3d_stage2({key: _fill(key, shape) for key, shape in facts["state_dict"].items()})
    stream = DetailStream(num_channels=1)
    decoder = Upernet3dDecoder(
        embed_dims=(int(facts["embed_dim"]),) * Upernet3dDecoder.num_taps, num_outputs=None, release_kernels=True
    ).eval()
    refine = Refinement(hidden_width=decoder.hidden_width, num_outputs=int(facts["num_classes"]))
    for name, module in (("detail", stream), ("decoder", decoder), ("refine", refine)):
        part = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in part.items()})
    maps = tuple(tensors[f"input.tap{i}"] for i in range(decoder.num_taps))  # (B, E, D, h, w) each
    features = Features(maps, maps[-1].mean(dim=(2, 3, 4)), (1, 16, 16))
    detail = stream(tensors["input.volume"])
    yield detail.quarter, tensors["output.cnn_c3"]
    for index, level in enumerate(decoder.pyramid(features)):
        if index:  # the finest one is not stored
            yield level, tensors[f"output.adapter{index}"]
    yield refine(decoder.hidden(features, detail.quarter), detail), tensors["output.logits"]


def _fill(key: str, shape: Sequence[int]) -> Tensor:
    """Weights that a case does not store: random numbers that follow from the key (README of the reference values)."""
    state = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    drawn = state.standard_normal(tuple(shape)).astype(np.float32)
    if drawn.ndim >= 2:
        return torch.from_numpy(drawn / np.sqrt(np.prod(shape[1:]), dtype=np.float32))
    return torch.from_numpy(1 + 0.1 * drawn if key.endswith("weight") else 0.1 * drawn)


CASES: dict[str, Case] = {
    "dinov3_vit_mlp": _official_vit,
    "dinov3_vit_swiglu": _official_vit,
    "dinov3_vit_7b_style": _official_vit,
    "meddinov3_vit": _official_vit,
    "timm_dinov3_vit": _timm_vit,
    "timm_dinov2_vit": _timm_vit,
    "hf_dinov3_vit": _hugging_face_vit,
    "dinov3_convnext": _convnext,
    "segdino_v2_decoder": _segdino_v2,
    "segdino_v1_head": _segdino_v1,
    "meddinov3_decoder": _meddinov3,
    "dinomed3d_stage2_head": _dinomed3d,
}


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}


def _build_vit(
    tensors: Mapping[str, Tensor],
    *,
    settings: Mapping[str, str] | None = None,
    hub_config: Mapping[str, Any] | None = None,
) -> ViT:
    state = convert(_weights(tensors), settings=settings, hub_config=hub_config)
    vit = backbone_from_state(state.config, state.tensors)
    assert isinstance(vit, ViT)
    return vit


def _all_tokens(vit: ViT, images: Tensor) -> Tensor:
    tokens = vit.tokens(images)
    return torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
