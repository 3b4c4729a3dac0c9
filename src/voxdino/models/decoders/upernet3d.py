"""DINO-Med3D's decoder: an adapter pyramid behind the backbone and a three-dimensional UPerNet (arXiv 2606.18886).

Written from the description of its release (dossier 1.4); agrees with numbers of the authors' code (tests/parity).
"""

import math
import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError, PlanError
from voxdino.models.decoders.base import Decoder, classifier
from voxdino.models.detail import GatedFusion, resize
from voxdino.models.features import Features

POOL_SIZES = (1, 2, 3, 6)  # bins along every axis


class Upernet3dDecoder(Decoder):
    """Four maps become a pyramid of 4, 2, 1 and 1/2 times the token grid; a UPerNet with 3 x 3 x 3 kernels joins it.

    decoder_width:   channels of every level (the authors: 256); a multiple of 4.
    finest_scale:    enlargement of the finest level in plane: 4 as published, 2 or 1. Less suits magnified input, whose
                     tokens cover but a few voxels, and costs less: most work is on that level.
    release_kernels: the release's cubic transposed kernels, which make the two finest levels 3 and 1 slices deeper, and
                     its fusion on their grid instead of that of `detail`; for parity only.
    """

    num_taps = 4
    num_dims = (3,)
    fuses_detail = True

    def __init__(
        self,
        *,
        embed_dims: tuple[int, ...],
        num_outputs: int | None,
        decoder_width: int = 256,
        finest_scale: int = 4,
        release_kernels: bool = False,
    ) -> None:
        super().__init__()
        if decoder_width % 4 or decoder_width < 4:
            raise ConfigError(f"decoder_width {decoder_width} is no multiple of 4", fix="e.g. 256, or 64 on a CPU.")
        if finest_scale not in (1, 2, 4) or (release_kernels and finest_scale != 4):
            fix = "choose 4, 2 or 1; the release's kernels have 4."
            raise ConfigError(f"finest_scale {finest_scale} cannot be built", fix=fix)
        self.release_kernels = release_kernels
        width = self.hidden_width = decoder_width
        resamplers = (
            _enlarge(width, finest_scale, cubic=release_kernels),
            _enlarge(width, min(2, finest_scale), cubic=release_kernels),
            nn.Identity(),
            nn.Conv3d(width, width, 3, stride=(1, 2, 2), padding=1),
        )
        self.adapt = nn.ModuleList(
            nn.Sequential(nn.Conv3d(dim, width, 1, bias=False), nn.InstanceNorm3d(width), nn.PReLU(), resampler)
            for dim, resampler in zip(embed_dims, resamplers, strict=True)
        )
        self.fuse = GatedFusion(width) if num_outputs is None else None  # a refinement, and so a detail stream, follows
        self.pool = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool3d(size), *_convolve(width, width // 4, 1)) for size in POOL_SIZES
        )
        self.join_pools = nn.Sequential(*_convolve(2 * width, width, 3))
        self.lateral = nn.ModuleList(nn.Sequential(*_convolve(width, width, 1)) for _ in range(3))
        self.smooth = nn.ModuleList(nn.Sequential(*_convolve(width, width, 3)) for _ in range(3))
        self.join = nn.Sequential(*_convolve(4 * width, width, 3), nn.Dropout(0.1))
        self.to_logits = classifier(width, num_outputs, num_dims=3)

    def pyramid(self, features: Features) -> list[Float[Tensor, "B W _ _ _"]]:
        """The levels, fine to coarse."""
        return [adapt(tokens) for tokens, adapt in zip(features.maps[-self.num_taps :], self.adapt, strict=True)]

    def hidden(
        self, features: Features, detail: Float[Tensor, "B W D H4 W4"] | None = None
    ) -> Float[Tensor, "B W d h w"]:
        """On the grid of `detail` where that is given, else `finest_scale` times as fine as the tokens.

        Errors: PlanError for a single token, which instance norm has nothing to compare with.
        """
        if features.maps[-1][0, 0].numel() == 1:
            fact = "upernet3d compares the tokens of a slab with each other, and sees but one token in one slice"
            fix = "enlarge the plan's crop or slab, or choose another decoder (--set decoder=conv3d)."
            raise PlanError(fact, where="crop", fix=fix)
        levels = self.pyramid(features)
        if detail is not None:
            assert self.fuse is not None  # built without outputs of its own
            if self.release_kernels:
                detail = resize(detail, levels[0])
            else:
                levels[0] = resize(levels[0], detail)
            levels[0] = self.fuse(levels[0], detail)
        coarsest = levels[-1]
        pooled = [resize(pool(coarsest), coarsest) for pool in self.pool]
        joined = [self.join_pools(torch.cat((coarsest, *pooled), dim=1))]
        for level, lateral, smooth in zip(levels[2::-1], self.lateral[::-1], self.smooth[::-1], strict=True):
            joined.append(smooth(lateral(level) + resize(joined[-1], level)))  # coarse to fine
        hidden: Tensor = self.join(torch.cat([resize(x, joined[-1]) for x in joined[::-1]], dim=1))
        return hidden


def _enlarge(width: int, scale: int, *, cubic: bool) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(width, width, (scale if cubic else 1, scale, scale), stride=(1, scale, scale))


def _convolve(in_channels: int, out_channels: int, kernel: int) -> tuple[nn.Module, ...]:
    groups = math.gcd(32, max(out_channels // 2, 1))  # of two channels: a pool of one bin has nothing else to norm over
    norm = nn.GroupNorm(groups, out_channels)
    return nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2), norm, nn.PReLU()


_RENAMED = [  # patterns of the authors' keys, ours; the first that fits
    (r"cnn_encoder\.stem\.", "detail.stem."),
    (r"cnn_encoder\.layer1\.", "detail.at_full."),
    (r"cnn_encoder\.layer2_down\.", "detail.at_half.0."),
    (r"cnn_encoder\.layer2_refine\.", "detail.at_half.1."),
    (r"cnn_encoder\.layer3_down\.", "detail.at_quarter.0."),
    (r"cnn_encoder\.layer3_refine\.", "detail.at_quarter.1."),
    (r"cnn_encoder\.proj_c3\.", "detail.widen."),
    (r"adapter_3d\.up4\.", "decoder.adapt.0."),
    (r"adapter_3d\.up2\.", "decoder.adapt.1."),
    (r"adapter_3d\.id1\.", "decoder.adapt.2."),
    (r"adapter_3d\.down2\.", "decoder.adapt.3."),
    (r"fusion_mid\.gate\.0\.", "decoder.fuse.gate."),
    (r"decoder\.ppm\.", "decoder.pool."),
    (r"decoder\.ppm_last\.", "decoder.join_pools."),
    (r"decoder\.fpn_in\.", "decoder.lateral."),
    (r"decoder\.fpn_out\.", "decoder.smooth."),
    (r"decoder\.fusion\.", "decoder.join."),
    (r"decoder_final\.r12\.conv\.", "refine.to_half."),
    (r"decoder_final\.r11\.conv\.", "refine.to_full."),
    (r"decoder_final\.cls_seg\.", "refine.to_logits."),
    (r"encoder\.backbone\.(?:model\.)?", "backbone."),
]
_RENAMED_PARTS = [
    (r"^(detail\..*\.)conv1\.", r"\1first."),
    (r"^(detail\..*\.)conv2\.", r"\1second."),
    (r"^(detail\..*\.)downsample\.", r"\1shortcut."),
    (r"^(backbone\..*\.)base_layer\.", r"\1"),
    (r"^(backbone\..*\.)lora_A\.default\.", r"\1adapter.down."),
    (r"^(backbone\..*\.)lora_B\.default\.", r"\1adapter.up."),
]


def from_dinomed3d_stage2(state: Mapping[str, Tensor], *, lora_alpha: float = 16.0) -> dict[str, Tensor]:
    """A stage-2 state of DINO-Med3D in the names of our Segmenter: `backbone.`, `detail.`, `decoder.`, `refine.`.

    peft's wrappings are taken off, its adapters become ours; one on the patch embedding (peft's matching of names by
    their end reaches it) is added to the weights under it, with `lora_alpha` / rank, the authors' alpha being 16. The
    UPerNet's own classifier (`decoder.cls.`), which the refinement replaces, is left out; unknown keys are kept.
    """
    renamed = {}
    for key, value in state.items():
        key = key.replace("base_model.model.", "")
        if key.startswith("decoder.cls."):
            continue
        for theirs, ours in _RENAMED:
            key, found = re.subn(rf"^{theirs}", ours, key)
            if found:
                break
        for theirs, ours in _RENAMED_PARTS:
            key = re.sub(theirs, ours, key)
        renamed[key] = value
    names = [f"backbone.patch_embed.proj.{part}weight" for part in ("", "adapter.down.", "adapter.up.")]
    if all(name in renamed for name in names):
        weight, down, up = (renamed[name] for name in names)
        if weight.shape[1:] == down.shape[1:] and up.shape == (len(weight), len(down), 1, 1):
            change = torch.einsum("er,rpyx->epyx", up[:, :, 0, 0], down) * (lora_alpha / len(down))
            renamed = {key: value for key, value in renamed.items() if key not in names[1:]}
            renamed[names[0]] = weight + change
    return renamed
