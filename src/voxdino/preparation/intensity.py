"""Intensity policy: how file values become network input, per modality. x -> (clip(x, lower, upper) - mean) / sd."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxdino.core.errors import ImageError
from voxdino.core.records import Record
from voxdino.preparation.distribution import Distribution
from voxdino.preparation.fingerprint import Fingerprint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)
CT_WINDOWS = {"soft tissue": (40.0, 400.0), "lung": (-600.0, 1500.0), "bone": (400.0, 1800.0)}  # level, width in HU

_CT_NAME = re.compile(r"(?<![a-z])(ct|cta|cbct|ldct|ncct|cect)(?![a-z])", re.IGNORECASE)
_EMPTY_SHARE = 0.25  # of voxels at the smallest value from which on they are taken for "outside the patient"


class ChannelPolicy(Record):
    """One channel of the model's input.

    source: channel of the image it is made of.
    kind:   "ct": HU clipped to the set's foreground percentiles · "window": one CT window · "photo": 8-bit colour,
            scaled as ImageNet · "mr", and all else: clipped to the case's own 0.5 and 99.5 percentiles, z-scored.
    lower, upper, mean, sd: in file values; None: computed for each case.
    """

    name: str
    source: int
    kind: Literal["ct", "mr", "photo", "window"]
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    sd: float | None = None


class ChannelScaling(Record):
    """x -> (clip(x[source], lower, upper) - mean) / sd, all in file values."""

    source: int
    lower: float
    upper: float
    mean: float
    sd: float


def normalise(image: NDArray[Any], scaling: Sequence[ChannelScaling]) -> NDArray[np.float32]:
    """File values (Csrc, *spatial) as network input (C, *spatial), one channel per scaling."""
    result = np.empty((len(scaling), *image.shape[1:]), dtype=np.float32)
    for channel, rule in zip(result, scaling, strict=True):
        np.clip(image[rule.source].astype(np.float32, copy=False), rule.lower, rule.upper, out=channel)
        channel -= np.float32(rule.mean)
        channel /= np.float32(rule.sd)
    return result


def scale_case(image: NDArray[Any], channels: Sequence[ChannelPolicy]) -> tuple[ChannelScaling, ...]:
    """The scaling of one case (Csrc, *spatial); what a policy leaves open is computed from the case's values.

    A constant image gets sd 1: it becomes zeros, not NaN. Errors: ImageError when channels are missing.
    """
    needed = max(policy.source for policy in channels) + 1
    if image.shape[0] < needed:
        fix = "give the image the channels of the plan's data set."
        raise ImageError(f"{image.shape[0]} channels, the plan needs {needed}.", fix=fix)
    return tuple(_scale_channel(image[policy.source], policy) for policy in channels)


def _scale_channel(values: NDArray[Any], policy: ChannelPolicy) -> ChannelScaling:
    if policy.lower is None or policy.upper is None or policy.mean is None or policy.sd is None:
        lower, upper, mean, sd = robust_statistics(values)
    else:
        lower, upper, mean, sd = policy.lower, policy.upper, policy.mean, policy.sd
    return ChannelScaling(source=policy.source, lower=lower, upper=upper, mean=mean, sd=sd if sd > 0 else 1.0)


def robust_statistics(values: NDArray[Any]) -> tuple[float, float, float, float]:
    """The 0.5 and 99.5 percentiles, and mean and sd of the values clipped to them, whatever the voxel order.

    Where a quarter or more of the voxels have the smallest value (air, a removed skull), the others alone count.
    """
    counted = Distribution.of(values)
    if _EMPTY_SHARE <= counted.share_of_smallest() < 1:
        counted = counted.without_smallest()
    lower, upper = counted.percentiles((0.5, 99.5))
    mean, sd = counted.clipped(lower, upper).mean_and_sd()
    return lower, upper, mean, sd


def choose_channels(fingerprint: Fingerprint, input_builder: str) -> tuple[tuple[ChannelPolicy, ...], str]:
    """The model's channels and the reason. input_builder "windows" makes three windows of a CT channel."""
    names = fingerprint.channels or tuple(f"channel {n}" for n in range(fingerprint.num_channels))
    if is_photo(fingerprint):
        names = fingerprint.channels or ("red", "green", "blue")
        rows = zip(names, IMAGENET_MEAN, IMAGENET_SD, strict=True)
        photo = tuple(
            ChannelPolicy(name=name, source=n, kind="photo", lower=0.0, upper=255.0, mean=255 * mean, sd=255 * sd)
            for n, (name, mean, sd) in enumerate(rows)
        )
        return photo, "8-bit colour pictures: scaled by ImageNet's mean and sd, as the backbone was trained."
    if input_builder == "windows" and len(names) == 1:
        return _windows(), "CT windows in HU: soft tissue, lung, bone; each scaled so that it looks like a grey photo."
    channels, reasons = [], []
    for source, name in enumerate(names):
        if names_ct(name) and fingerprint.foreground:
            facts = fingerprint.foreground[source]
            channels.append(
                ChannelPolicy(
                    name=name,
                    source=source,
                    kind="ct",
                    lower=facts.lower,
                    upper=facts.upper,
                    mean=facts.mean,
                    sd=facts.sd or 1.0,
                )
            )
            reasons.append(
                f"'{name}' is CT: one scale for all cases, clipped to the 0.5 and 99.5 percentiles "
                f"({facts.lower:.0f} to {facts.upper:.0f} HU) of {facts.num_voxels} labelled voxels, "
                f"mean {facts.mean:.1f}, sd {facts.sd:.1f}."
            )
        else:
            channels.append(ChannelPolicy(name=name, source=source, kind="mr"))
            reasons.append(f"'{name}' has no fixed scale: each case is clipped to its own percentiles and z-scored.")
    return tuple(channels), " ".join(reasons)


def names_ct(channel: str) -> bool:
    """Whether a channel's name says computed tomography: "CT", "cta", "CT_venous"."""
    return _CT_NAME.search(channel) is not None


def is_photo(fingerprint: Fingerprint) -> bool:
    """Whether the set is 8-bit colour pictures."""
    cases = fingerprint.cases
    return fingerprint.num_channels == 3 and all(
        case.unit == "px" and case.dtype == "uint8" and case.ndim == 2 for case in cases
    )


def _windows() -> tuple[ChannelPolicy, ...]:
    grey_mean, grey_sd = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_SD) / 3
    return tuple(
        ChannelPolicy(
            name=name,
            source=0,
            kind="window",
            lower=level - width / 2,
            upper=level + width / 2,
            mean=level - width / 2 + grey_mean * width,
            sd=grey_sd * width,
        )
        for name, (level, width) in CT_WINDOWS.items()
    )
