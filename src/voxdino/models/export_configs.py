"""The config.json beside exported weights: what transformers and timm must know to build the model they fit."""

from typing import Any

from voxdino.core.errors import ConfigError
from voxdino.models.backbones.build import BackboneConfig
from voxdino.models.backbones.convnext import ConvNeXtConfig
from voxdino.models.backbones.vit import ViTConfig
from voxdino.models.registry import BACKBONES

IMAGE_MEAN, IMAGE_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the weights expect

# timm's name for each published size; those of DINOv3 with biases of queries and values end in _qkvb.
TIMM_NAMES: dict[str, str] = {
    "dinov3_vits16": "vit_small_patch16_dinov3",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3",
    "dinov3_vitb16": "vit_base_patch16_dinov3",
    "dinov3_vitl16": "vit_large_patch16_dinov3",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3",
    "dinov3_convnext_tiny": "convnext_tiny",
    "dinov3_convnext_small": "convnext_small",
    "dinov3_convnext_base": "convnext_base",
    "dinov3_convnext_large": "convnext_large",
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
}
# Fields that two backbones of one published size may differ in.
_NOT_SIZE = {
    "qkv_bias", "mask_k_bias", "norm_eps", "local_cls_norm", "layer_scale_init", "rope_dtype", "position_grid",
}  # fmt: skip


def vit_hub_config(config: ViTConfig) -> dict[str, Any]:
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_hidden,
        "use_gated_mlp": config.ffn == "swiglu",
        "hidden_act": "silu" if config.ffn == "swiglu" else "gelu",
        "patch_size": config.patch_size,
        "image_size": 14 * config.patch_size,
        "num_channels": config.in_planes,
        "num_register_tokens": config.num_registers,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and not config.mask_k_bias,
        "value_bias": config.qkv_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": config.layer_scale_init,
        "rope_theta": config.rope_base,
        "pos_embed_rescale": None,  # no random scale of positions in training mode, unless asked for
    }


def dinov2_hub_config(config: ViTConfig) -> dict[str, Any]:
    """Errors: ConfigError for positions that are no square, feed-forward widths that no mlp_ratio gives."""
    assert config.position_grid is not None
    rows, columns = config.position_grid
    if rows != columns:
        fact = f"positions on a grid of {rows} x {columns} are no square"
        raise ConfigError(fact, fix="use the official layout.")
    dim, gated = config.embed_dim, config.ffn == "swiglu"
    widths = {ratio: (ratio * dim * 2 // 3 + 7) // 8 * 8 if gated else ratio * dim for ratio in range(1, 17)}
    ratio = next((ratio for ratio, width in widths.items() if width == config.ffn_hidden), None)
    if ratio is None:
        fact = f"a feed-forward layer of {config.ffn_hidden} is no whole multiple of {dim} channels"
        raise ConfigError(f"{fact}, as transformers' Dinov2Model needs", fix="use the official or the timm layout.")
    kind = "Dinov2WithRegisters" if config.num_registers else "Dinov2"
    return {
        "architectures": [f"{kind}Model"],
        "model_type": "dinov2_with_registers" if config.num_registers else "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu",
        "patch_size": config.patch_size,
        "image_size": rows * config.patch_size,
        "num_channels": config.in_planes,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": config.layer_scale_init,
    } | ({"num_register_tokens": config.num_registers} if config.num_registers else {})


def convnext_hub_config(config: ConvNeXtConfig) -> dict[str, Any]:
    return {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "hidden_sizes": list(config.dims),
        "depths": list(config.depths),
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "layer_scale_init_value": config.layer_scale_init,
        "num_channels": 3,
        "image_size": 224,
    }


def timm_config(config: ViTConfig | ConvNeXtConfig) -> dict[str, Any] | None:
    """config.json of timm's local folders; None where no model of timm has this size."""
    size = _size(config)
    published = next((name for name in TIMM_NAMES if _size(BACKBONES[name]) == size), None)
    if published is None:
        return None
    architecture, side = TIMM_NAMES[published], 256
    if isinstance(config, ViTConfig):
        architecture += "_qkvb" if config.family == "dinov3" and config.qkv_bias else ""
        side = config.patch_size * config.position_grid[0] if config.position_grid else side
        first, classifier, width = "patch_embed.proj", "head", config.embed_dim
    else:
        first, classifier, width = "stem.0", "head.fc", config.dims[-1]
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": width,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_SD),
            "num_classes": 0,
            "first_conv": first,
            "classifier": classifier,
        },
    }


def timm_epsilon(config: ViTConfig) -> float:
    return 1e-6 if config.family == "dinov2" else 1e-5


def _size(config: BackboneConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_json().items() if key not in _NOT_SIZE}
