"""What is looked at while a pretraining runs: features of fixed images, probes of labelled ones, alarms."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from voxdino.models.backbones.vit import ViT
from voxdino.models.precision import autocast
from voxdino.preparation.classification import ClassificationSet
from voxdino.pretraining.alarms import Alarms
from voxdino.pretraining.pictures import draw_pca, draw_similarity
from voxdino.pretraining.pool import Pool
from voxdino.probes.class_tokens import class_probe
from voxdino.probes.measures import effective_rank, feature_spread
from voxdino.probes.patches import patch_probe

NUM_IMAGES = 64
NUM_SHOWN = 6
MIN_IMAGES = 16
SIDE = 224
AT_ONCE = 16
ENTROPIES = {"class": "target_entropy", "patch": "patch_entropy"}  # kind of targets -> what a step calls it


@dataclass(frozen=True, eq=False)
class Probes:
    """Labelled data that tell how good features are.

    pictures: a set of classified pictures; num_pictures: of it, to train on and to test on, at most.
    workdir:  prepared labelled cases, of which `fold` is held back.
    """

    pictures: ClassificationSet | None = None
    num_pictures: int = 1000
    workdir: Path | None = None
    fold: int = 0


@dataclass(eq=False)
class Watch:
    """Looks at images of a pool, which are read when it first does."""

    pool: Pool
    patch_size: int
    probes: Probes
    alarms: Alarms

    @cached_property
    def images(self) -> Float[Tensor, "n P H W"]:
        """Fixed ones, evenly spread over the pool, on squares of about 224 pixels."""
        side = max(1, round(SIDE / self.patch_size)) * self.patch_size
        places = np.linspace(0, len(self.pool) - 1, min(NUM_IMAGES, len(self.pool))).round().astype(int)
        return torch.stack([_squared(torch.from_numpy(self.pool.read(int(place)).image), side) for place in places])

    def look(self, backbone: ViT, step: int, folder: Path, device: torch.device, bf16: bool) -> dict[str, float]:
        """Numbers of a backbone in eval mode, which computes in bfloat16 or not; its pictures go to `folder`."""
        with torch.inference_mode(), autocast(device, bf16):
            parts = [backbone.tokens(part.to(device)) for part in self.images.split(AT_ONCE)]
        cls = torch.cat([part.cls for part in parts]).float().cpu()
        patches = torch.cat([part.patches.flatten(0, 1)[::7] for part in parts]).float().cpu()
        row = {"rank": effective_rank(cls), "spread": feature_spread(cls), "patch_rank": effective_rank(patches)}
        if self.probes.pictures is not None:
            most = self.probes.num_pictures
            found = class_probe(self.probes.pictures, backbone, num_train=most, num_test=most, bf16=bf16)
            row |= {"knn": found.knn, "linear": found.linear}
        if self.probes.workdir is not None:
            row["patch_dice"] = patch_probe(self.probes.workdir, backbone, fold=self.probes.fold, bf16=bf16).dice
        shown = self.images[:: max(1, len(self.images) // NUM_SHOWN)][:NUM_SHOWN].to(device)
        middle = (shown.shape[2] // 2, shown.shape[3] // 2)
        draw_pca(backbone, shown, folder / f"pca-{step:08d}.png")
        draw_similarity(backbone, shown, [middle], folder / f"similarity-{step:08d}.png")
        return {name: round(value, 6) for name, value in row.items()}

    def judge(self, step: int, terms: Mapping[str, float]) -> list[str]:
        """What there is to say about the numbers of a step."""
        entropies = {kind: terms[name] for kind, name in ENTROPIES.items() if name in terms}
        losses = {name: value for name, value in terms.items() if name not in ("grad_norm", *ENTROPIES.values())}
        alarms = self.alarms.update(step, losses=losses, entropies=entropies, gradient_norm=terms["grad_norm"])
        return [str(alarm) for alarm in alarms]

    def judge_look(self, step: int, row: Mapping[str, float]) -> list[str]:
        """What there is to say about a look; of a handful of images the rank tells nothing."""
        rank = row["rank"] if len(self.images) >= MIN_IMAGES else None
        return [str(alarm) for alarm in self.alarms.update(step, rank=rank, spread=row["spread"])]


def _squared(image: Float[Tensor, "C D H W"], side: int) -> Float[Tensor, "P S S"]:
    """The middle slice on a square, as three planes."""
    planes = image[:, image.shape[1] // 2]
    planes = planes if len(planes) == 3 else planes[:1].expand(3, -1, -1)
    return F.interpolate(planes[None], size=(side, side), mode="bilinear", antialias=True)[0]
