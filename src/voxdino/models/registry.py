"""The tables of the models layer: a new backbone, decoder or input builder is one file and one line here."""

from collections.abc import Mapping
from typing import TypeVar

from voxdino.core.errors import UsageError
from voxdino.core.records import nearest
from voxdino.models.backbones.build import BackboneConfig
from voxdino.models.backbones.convnext import ConvNeXtConfig
from voxdino.models.backbones.no_backbone import NoBackboneConfig
from voxdino.models.backbones.vit import ViTConfig
from voxdino.models.backbones.vit import default_taps as default_taps
from voxdino.models.decoders.base import Decoder
from voxdino.models.decoders.conv3d import Conv3dDecoder
from voxdino.models.decoders.linear import LinearDecoder
from voxdino.models.decoders.primus import PrimusDecoder, SingleTapPrimusDecoder
from voxdino.models.decoders.segdino_v1 import SegdinoV1Decoder
from voxdino.models.decoders.tpa_sad import TpaSadDecoder
from voxdino.models.decoders.unet import Unet2dDecoder, Unet3dDecoder
from voxdino.models.decoders.upernet3d import Upernet3dDecoder
from voxdino.models.inputs import Channels, InputBuilder, Neighbours, Repeat, Rgb, Slices3, Slices5, Windows

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, *, kind: str) -> T:
    """table[name]; UsageError naming the nearest known name otherwise."""
    if name in table:
        return table[name]
    raise UsageError(f"unknown {kind} {name!r}.{nearest(name, table)}", fix=f"known: {', '.join(sorted(table))}.")


def _dinov3(dim: int, depth: int, num_heads: int, ffn_hidden: int, *, swiglu: bool = False) -> ViTConfig:
    return ViTConfig(
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=16,
        ffn="swiglu" if swiglu else "mlp",
        ffn_hidden=ffn_hidden,
    )


def _dinov2(dim: int, depth: int, num_heads: int, ffn_hidden: int, *, registers: int = 0) -> ViTConfig:
    return ViTConfig(
        family="dinov2",
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=14,
        ffn="swiglu" if dim == 1536 else "mlp",
        ffn_hidden=ffn_hidden,
        mask_k_bias=False,
        num_registers=registers,
        norm_eps=1e-6,
        position_grid=(37, 37),
    )


# The published families (dossier 5.1), a small one for demonstrations and tests, and none at all.
BACKBONES: dict[str, BackboneConfig] = {
    "voxdino_tiny": _dinov3(192, 12, 3, 768),
    "dinov3_vits16": _dinov3(384, 12, 6, 1536),
    "dinov3_vits16plus": _dinov3(384, 12, 6, 1536, swiglu=True),
    "dinov3_vitb16": _dinov3(768, 12, 12, 3072),
    "dinov3_vitl16": _dinov3(1024, 24, 16, 4096),
    "dinov3_vith16plus": _dinov3(1280, 32, 20, 5120, swiglu=True),
    "dinov3_vit7b16": _dinov3(4096, 40, 32, 8192, swiglu=True).model_copy(
        update={"qkv_bias": False, "mask_k_bias": False, "local_cls_norm": True}
    ),
    "dinov3_convnext_tiny": ConvNeXtConfig(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "dinov3_convnext_small": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "dinov3_convnext_base": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "dinov3_convnext_large": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "dinov2_vits14": _dinov2(384, 12, 6, 1536),
    "dinov2_vitb14": _dinov2(768, 12, 12, 3072),
    "dinov2_vitl14": _dinov2(1024, 24, 16, 4096),
    "dinov2_vitg14": _dinov2(1536, 40, 24, 4096),
    "dinov2_vits14_reg": _dinov2(384, 12, 6, 1536, registers=4),
    "dinov2_vitb14_reg": _dinov2(768, 12, 12, 3072, registers=4),
    "dinov2_vitl14_reg": _dinov2(1024, 24, 16, 4096, registers=4),
    "dinov2_vitg14_reg": _dinov2(1536, 40, 24, 4096, registers=4),
    "tiny": _dinov3(128, 4, 2, 512).model_copy(update={"layer_scale_init": 0.5}),
    "none": NoBackboneConfig(),
}

DECODERS: dict[str, type[Decoder]] = {
    "linear": LinearDecoder,
    "tpa_sad": TpaSadDecoder,
    "segdino_v1": SegdinoV1Decoder,
    "primus": PrimusDecoder,
    "primus_single": SingleTapPrimusDecoder,
    "conv3d": Conv3dDecoder,
    "upernet3d": Upernet3dDecoder,
    "unet_2d": Unet2dDecoder,
    "unet_3d": Unet3dDecoder,
}

INPUT_BUILDERS: dict[str, type[InputBuilder]] = {
    "repeat": Repeat,
    "rgb": Rgb,
    "neighbours": Neighbours,
    "slices_3": Slices3,
    "slices_5": Slices5,
    "windows": Windows,
    "channels": Channels,
}
