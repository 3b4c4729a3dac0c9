"""The CNN that everyone compares with: a U-Net as nnU-Net configures it, which reads the image and no features.

Built by the maintained `dynamic-network-architectures` (extra `baseline`); its topology follows the published rules of
nnU-Net (Isensee et al., Nature Methods 2021), with no deep supervision and at most 320 channels in 2-D too.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from voxdino.core.errors import ConfigError, ResourceError
from voxdino.models.decoders.base import Decoder, classifier
from voxdino.models.features import Features

BLOCKS = ("plain", "residual")
_WIDTH, _MOST_CHANNELS = 32, 320
_SMALLEST_SIDE = 4  # of the coarsest map
_RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6)  # in stages of the residual encoder; the last number repeats


class Topology(NamedTuple):
    """Per stage and axis."""

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]


def plan_topology(size: Sequence[int], spacing_mm: Sequence[float]) -> Topology:
    """Halve until no axis is longer than seven voxels, finer axes alone until all agree within a factor of two.

    An axis has kernels of one voxel while it is at least twice as coarse as the finest, of three from then on.
    """
    sizes, spacing = list(size), list(spacing_mm)
    strides, kernels, wide = [(1,) * len(sizes)], [], [False] * len(sizes)
    while True:
        wide = [was or one < 2 * min(spacing) for was, one in zip(wide, spacing, strict=True)]
        kernels.append(tuple(3 if one else 1 for one in wide))
        least = 2 * _SMALLEST_SIDE if len(strides) > 1 else 2  # two stages at least: a U has two ends
        divisible = [n >= least for n in sizes]
        if not any(divisible):
            break
        finest = min(one for one, can in zip(spacing, divisible, strict=True) if can)
        halved = [can and one < 2 * finest for one, can in zip(spacing, divisible, strict=True)]
        strides.append(tuple(2 if half else 1 for half in halved))
        sizes = [math.ceil(n / 2) if half else n for n, half in zip(sizes, halved, strict=True)]
        spacing = [2 * one if half else one for one, half in zip(spacing, halved, strict=True)]
    return Topology(tuple(strides), tuple(kernels))


class UnetDecoder(Decoder):
    """A whole U-Net in a decoder's place: give it the image; of `features` it reads nothing.

    Sides that its strides do not divide are extended by their last voxels and cut back.
    plan_size:       voxels of a training crop along each axis, from which the number of stages follows.
    plan_spacing_mm: their size; default: as long as wide.
    blocks:          "plain", or "residual" in the encoder.
    """

    num_taps: ClassVar[int] = 0
    reads_image: ClassVar[bool] = True
    usual_size: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        *,
        embed_dims: tuple[int, ...],
        num_outputs: int | None,
        num_channels: int = 1,
        plan_size: tuple[int, ...] | None = None,
        plan_spacing_mm: tuple[float, ...] | None = None,
        blocks: str = "plain",
    ) -> None:
        super().__init__()
        assert not embed_dims
        size = plan_size or self.usual_size
        spacing = plan_spacing_mm or (1.0,) * len(size)
        (dims,) = self.num_dims
        if not len(size) == len(spacing) == dims or min(size) < 1 or min(spacing) <= 0:
            fact = f"plan_size {size} and plan_spacing_mm {spacing} are not {dims} lengths"
            raise ConfigError(fact, fix=f"give the crop of the plan, e.g. plan_size {self.usual_size}.")
        if blocks not in BLOCKS:
            raise ConfigError(f"blocks is {blocks!r}", fix=f"choose from {', '.join(BLOCKS)}.")
        if math.prod(size) == 1:
            raise ConfigError("plan_size is a single voxel", fix="give the crop of the plan.")
        topology = plan_topology(size, spacing)
        self.hidden_width = _WIDTH
        self.total_strides = tuple(math.prod(axis) for axis in zip(*topology.strides, strict=True))
        self.network = _network(num_channels, topology, residual=blocks == "residual")
        self.to_logits = classifier(_WIDTH, num_outputs, num_dims=dims)

    def hidden(
        self,
        features: Features,
        detail: Float[Tensor, "B C *fine"] | None = None,
        image: Float[Tensor, "B P D H W"] | None = None,
    ) -> Float[Tensor, "S E *spatial"]:
        """Of every voxel. In 2-D the slices are the batch: (B * D, E, H, W); in 3-D (B, E, D, H, W)."""
        assert image is not None
        x = image if self.num_dims == (3,) else image.transpose(1, 2).flatten(0, 1)
        size = x.shape[2:]
        out: Tensor = self.network(F.pad(x, self._padding(size), mode="replicate"))
        inside: tuple[Any, ...] = (..., *(slice(n) for n in size))
        return out[inside]

    def native_logits(
        self, features: Features, image: Float[Tensor, "B P D H W"] | None = None
    ) -> Float[Tensor, "S K *spatial"]:
        logits: Tensor = self.to_logits(self.hidden(features, image=image))
        return logits

    def forward(
        self,
        features: Features,
        size: Sequence[int] | None = None,
        image: Float[Tensor, "B P D H W"] | None = None,
    ) -> Float[Tensor, "S K *spatial"]:
        """Logits in float32 of the image's voxels, resized linearly where `size` is another."""
        logits = self.native_logits(features, image).float()
        if size is None or logits.shape[2:] == tuple(size):
            return logits
        return F.interpolate(logits, size=tuple(size), mode="trilinear" if len(size) == 3 else "bilinear")

    def _padding(self, size: Sequence[int]) -> list[int]:
        """What `F.pad` wants: voxels before and after, last axis first. A coarsest map has two voxels at least."""
        after = [-n % stride for n, stride in zip(size, self.total_strides, strict=True)]
        if all(n + more == stride for n, more, stride in zip(size, after, self.total_strides, strict=True)):
            after[-1] += self.total_strides[-1]
        return [number for more in reversed(after) for number in (0, more)]


class Unet2dDecoder(UnetDecoder):
    """U-Net as nnU-Net configures it, slice by slice: the baseline without a backbone."""

    num_dims: ClassVar[tuple[int, ...]] = (2,)
    usual_size: ClassVar[tuple[int, ...]] = (256, 256)


class Unet3dDecoder(UnetDecoder):
    """U-Net as nnU-Net configures it, in 3-D: the baseline without a backbone."""

    num_dims: ClassVar[tuple[int, ...]] = (3,)
    usual_size: ClassVar[tuple[int, ...]] = (16, 128, 128)


def _network(num_channels: int, topology: Topology, *, residual: bool) -> nn.Module:
    """The network up to its last features; the classifier is ours."""
    try:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    except ImportError as error:
        told = f"dynamic-network-architectures cannot be imported ({error})"
        raise ResourceError(told, where="decoder unet", fix="pip install 'voxdino[baseline]'.") from error
    num_stages, in_2d = len(topology.strides), len(topology.strides[0]) == 2
    last = _RESIDUAL_BLOCKS[-1:] * num_stages
    kind, convolutions = (
        (ResidualEncoderUNet, {"n_blocks_per_stage": (*_RESIDUAL_BLOCKS, *last)[:num_stages]})
        if residual
        else (PlainConvUNet, {"n_conv_per_stage": 2})
    )
    network: Any = kind(
        input_channels=num_channels,
        n_stages=num_stages,
        features_per_stage=[min(_WIDTH * 2**stage, _MOST_CHANNELS) for stage in range(num_stages)],
        conv_op=nn.Conv2d if in_2d else nn.Conv3d,
        kernel_sizes=[list(kernel) for kernel in topology.kernels],
        strides=[list(stride) for stride in topology.strides],
        num_classes=1,
        n_conv_per_stage_decoder=1 if residual else 2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d if in_2d else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **convolutions,
    )
    network.apply(network.initialize)
    network.decoder.seg_layers = nn.ModuleList(nn.Identity() for _ in network.decoder.seg_layers)
    _register_once(network)
    built: nn.Module = network
    return built


def _register_once(network: Any) -> None:
    """Take out second names of modules, under which their weights would be stored a second time."""
    del network.decoder.encoder
    for module in list(network.modules()):
        chain = getattr(module, "all_modules", None)  # of a convolution, its norm and what follows: what runs
        for name, child in list(module.named_children()):
            if isinstance(chain, nn.Sequential) and any(child is part for part in chain):
                delattr(module, name)
