"""What learns in a self-distillation: a backbone and its two projection heads, as student and as teacher."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxdino.models.backbones.vit import ViT
from voxdino.pretraining.config import HeadConfig
from voxdino.pretraining.heads import ProjectionHead


class Seen(NamedTuple):
    """What a network says about the views of B images; K and L prototypes of the two heads.

    cls:     (2 B, E) class tokens of the global crops after the final norm, first crops first.
    dino:    (S, B, K) logits of the class tokens: two global crops, then the local ones.
    ibot:    (M, L) logits of the masked patches of the global crops, row by row.
    patches: (2 B, N, E) after the final norm; of the teacher None.
    """

    cls: Float[Tensor, "G E"]
    dino: Float[Tensor, "S B K"]
    ibot: Float[Tensor, "M L"]
    patches: Float[Tensor, "G N E"] | None


class Network(nn.Module):
    """Backbone, `dino_head` for class tokens, `ibot_head` for masked patches: named as in the official checkpoints."""

    def __init__(self, backbone: ViT, dino: HeadConfig, ibot: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head, self.ibot_head = (
            ProjectionHead(
                backbone.embed_dim,
                num_prototypes=head.num_prototypes,
                hidden_dim=head.hidden_dim,
                bottleneck_dim=head.bottleneck_dim,
            )
            for head in (dino, ibot)
        )

    def forward(
        self,
        global_crops: Float[Tensor, "G P H W"],
        local_crops: Float[Tensor, "X P h w"] | None,
        masks: Bool[Tensor, "G N"],
    ) -> Seen:
        """local_crops: of the student, which also sees the mask token where `masks` says so; None: the teacher."""
        num_images, is_student = len(global_crops) // 2, local_crops is not None
        seen = self.backbone.tokens(global_crops, masks=masks if is_student else None)
        cls = seen.cls
        if local_crops is not None and len(local_crops):
            cls = torch.cat((cls, self.backbone.tokens(local_crops, local=True).cls))
        dino = self.dino_head(cls).unflatten(0, (-1, num_images))
        return Seen(seen.cls, dino, self.ibot_head(seen.patches[masks]), seen.patches if is_student else None)


class PatchFeatures(nn.Module):
    """A frozen backbone whose patches are asked for: the Gram teacher."""

    def __init__(self, backbone: ViT) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "G P H W"], grid: tuple[int, int]) -> Float[Tensor, "G N E"]:
        """Patches after the final norm; of larger images resized bicubically to `grid`, without antialiasing."""
        own = tuple(side // self.backbone.patch_size for side in images.shape[2:])
        patches: Tensor = self.backbone.tokens(images).patches
        if own == grid:
            return patches
        plane = patches.transpose(1, 2).unflatten(2, own).float()  # (G, E, rows, columns)
        resized = nn.functional.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)
