"""Any encoder of the timm library that gives its intermediate features, behind the seam of the ViTs.

An optional extra (`pip install 'voxdino[timm]'`); written from timm's documented interface (create_model, feature_info,
forward_intermediates, forward_head). Nothing here downloads: models are built empty, weights come through
voxdino.models.weights.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from voxdino.core.errors import ConfigError, ResourceError
from voxdino.core.records import Record, nearest
from voxdino.models.backbones.base import Backbone, in_portions, on_grid, pad_to_multiple
from voxdino.models.backbones.vit import default_taps
from voxdino.models.features import Features

_PREFERRED_PATCH = 16
_LICENCES = {"dinov3-license": "DINOv3 License", "apache-2.0": "Apache-2.0"}  # as we call them
# How families are asked to take images of any size; those that know none of these words are tried as they are.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmConfig(Record):
    """A model by timm's name for its architecture, "resnet50", with or without a tag for its weights, ".a1_in1k"."""

    family: Literal["timm"] = "timm"
    model: str = Field(pattern=r"^[a-z0-9_]+(\.[A-Za-z0-9_]+)?$")

    @property
    def num_blocks(self) -> int:
        return 0  # not known before it is built

    def summary(self) -> str:
        """One line for tables."""
        return f"timm model {self.model}"


class TimmBackbone(Backbone):
    """Images (B, 3, H, W), sides a multiple of the patch, to features of chosen parts, all on one grid.

    Parts are those of timm's `feature_info`: blocks of a transformer, stages of a convolutional network. The patch is
    the largest stride up to 16 (14 for a ViT/14); finer maps are averaged, coarser ones resized, and images that the
    coarsest stride does not divide are extended by their last row and column. The class token is what timm's head
    would read. Batch norms keep their pretrained statistics and scales, whatever trains: batches are small here.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config: TimmConfig = config
        with torch.device("cpu"):  # even where the caller builds on "meta": timm computes while it builds
            self.model, self._normalises_taps = _build(config.model)
        info: Any = self.model.feature_info
        self._strides = tuple(int(part["reduction"]) for part in info)
        self._dims = tuple(int(part["num_chs"]) for part in info)
        self._names = tuple(str(part["module"]) for part in info)
        self.depth = len(self._strides)
        self.patch_size = max((s for s in self._strides if s <= _PREFERRED_PATCH), default=min(self._strides))
        positions = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        self._begins = tuple(positions[name] for name in self._names)
        self._ends = tuple(
            max(p for module, p in positions.items() if module == name or module.startswith(f"{name}."))
            for name in self._names
        )
        self._positions = positions

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        taps: Sequence[int] | None = None,
        tap_norm: bool = True,
        num_slices: int = 1,
        images_at_once: int | None = None,
    ) -> Features:
        chosen, grid = self._chosen(taps), self._grid(images)
        padded = pad_to_multiple(images, max(self._strides))
        norm = tap_norm and self._normalises_taps
        joined = in_portions(lambda part: _run(self.model, part, chosen, norm=norm), padded, images_at_once)
        maps = tuple(
            on_grid(one, grid, stride=self._strides[tap], patch_size=self.patch_size)
            for one, tap in zip(joined[1:], chosen, strict=True)
        )
        return Features(maps, joined[0], (self.patch_size, self.patch_size))

    def default_taps(self) -> tuple[int, ...]:
        """Of parts that share one stride the last of each quarter, else the last four."""
        if len(set(self._strides)) == 1 and self.depth >= 4:
            return default_taps(self.depth)
        return tuple(range(self.depth))[-4:]

    def embed_dims(self, taps: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._dims[tap] for tap in taps)

    def tail(self, num_parts: int) -> tuple[nn.Module, ...]:
        """All that timm registers after the part before them."""
        if num_parts == 0:
            return ()
        before = self._ends[self.depth - num_parts - 1] if num_parts < self.depth else self._begins[0] - 1
        return tuple(module for name, module in self.model.named_modules() if name and self._positions[name] > before)

    def level(self, name: str) -> int:
        """In the order in which timm registers modules; what lies before the first part has -1."""
        position = self._positions[name.removeprefix("model.").rpartition(".")[0]]
        if position < self._begins[0]:
            return -1
        return min(sum(end < position for end in self._ends), self.depth - 1)

    @property
    def classifier_prefixes(self) -> tuple[str, ...]:
        """Begins of the names that published files have for a classifier, which this backbone has not."""
        names: Any = self._published("classifier") or ()
        return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))

    @property
    def licence(self) -> str:
        """Of the pretrained weights, as timm states it."""
        stated = str(self._published("license") or "not stated by timm; see the page of the weights")
        return _LICENCES.get(stated, stated)

    def _published(self, key: str) -> Any:
        facts: Any = self.model.pretrained_cfg
        return facts.get(key)


def _run(model: Any, images: Tensor, taps: Sequence[int], *, norm: bool) -> list[Tensor]:
    """Class token, then the maps as timm gives them."""
    indices = sorted(set(taps))
    final, maps = model.forward_intermediates(images, indices=indices, norm=norm, output_fmt="NCHW")
    by_tap = dict(zip(indices, maps, strict=True))
    return [model.forward_head(final, pre_logits=True), *(by_tap[tap] for tap in taps)]


def _build(name: str) -> tuple[nn.Module, bool]:
    """The model without classifier and weights, and whether it normalises its intermediate maps.

    It is tried on an image of another size than its own.
    """
    timm = _import(name)
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models())
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}.{close}", fix="see timm.list_models().")
    reason = ""
    for settings in _ANY_SIZE:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **settings)
        except TypeError:  # it does not know the setting
            continue
        except RuntimeError as error:  # an unknown tag
            raise ConfigError(str(error), where=f"timm:{name}", fix="leave out the part after the point.") from error
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
            fix = "choose a model with timm's forward_intermediates."
            raise ConfigError("gives no intermediate features", where=f"timm:{name}", fix=fix)
        fixed: nn.Module = timm.layers.freeze_batch_norm_2d(model)
        for norm in (True, False):
            if not (reason := _failure(fixed, norm=norm)):
                return fixed, norm
    raise ConfigError(
        f"takes no images of other sizes than it was made for ({reason})",
        where=f"timm:{name}",
        fix="choose another model: convolutional ones and most plain transformers take any size.",
    )


@torch.no_grad()
def _failure(model: nn.Module, *, norm: bool) -> str:
    """Why a small image does not give maps of the promised sizes; "" where it does."""
    parts: Any = model.feature_info
    strides = [int(part["reduction"]) for part in parts]
    side = max(strides)
    model.eval()
    try:
        maps = _run(model, torch.zeros(1, 3, 2 * side, 3 * side, device="cpu"), range(len(strides)), norm=norm)[1:]
    except Exception as error:  # whatever one model of a thousand says
        return str(error).strip().partition("\n")[0] or type(error).__name__
    finally:
        model.train()
    promised = [(1, part["num_chs"], 2 * side // n, 3 * side // n) for part, n in zip(parts, strides, strict=True)]
    return "" if [tuple(one.shape) for one in maps] == promised else "maps of other sizes than promised"


def _import(name: str) -> Any:
    try:
        import timm
        import timm.layers
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ResourceError(
            f"timm cannot be imported ({str(error).partition(chr(10))[0]})",
            where=f"timm:{name}",
            fix="pip install 'voxdino[timm]', with a torchvision that fits your torch.",
        ) from error
    return timm
