"""The recipe `auto`: which of the recipes suits a data set, decided from its facts, with the reason."""

from collections.abc import Collection
from typing import NamedTuple

from voxdino.core.safe_files import format_bytes
from voxdino.finetuning.cost import memory_of
from voxdino.finetuning.recipes import RECIPES
from voxdino.models.backbones.base import Ability
from voxdino.preparation.decisions import in_plane_length, smallest_structure
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.plan import Plan

FEW_CASES = 20  # below, adapting the backbone learns the cases by heart
THICK = 5.0  # slice distance over in-plane spacing from which on neighbouring slices tell little about each other
USABLE = 0.6  # of the memory
FEW_SLICES = 8  # a 3-D decoder needs more
LESION_VOXELS = 10.0  # in-plane; smaller structures are missed where large ones are drawn more often
SEVERAL = 1.5  # components a case from which on a structure is lesions, not an organ


class Choice(NamedTuple):
    """settings: what of the recipe is set otherwise, as `--set` takes it."""

    recipe: str
    settings: dict[str, str]
    reason: str


def choose_recipe(
    fingerprint: Fingerprint,
    plan: Plan,
    *,
    num_train: int,
    memory_bytes: int | None = None,
    abilities: Collection[Ability] = frozenset(("lora",)),
) -> Choice:
    """The recipe for a data set.

    num_train:    cases to train on.
    memory_bytes: that the device has; None: enough.
    abilities:    of the backbone.
    """
    name, reason = _recipe(fingerprint, plan, num_train, memory_bytes, abilities)
    lesions = _lesions(fingerprint, plan)
    if lesions is None:
        return Choice(name, {}, f"{reason}.")
    return Choice(name, {"quotas.by": "lesion"}, f"{reason}; {lesions}, so each is drawn as often as a large one.")


def _lesions(fingerprint: Fingerprint, plan: Plan) -> str | None:
    """What makes the smallest structure one of small lesions, if it does."""
    smallest = smallest_structure(fingerprint)
    if smallest is None or fingerprint.labels is None:
        return None
    name, extent = smallest
    found = fingerprint.structures[str(dict(fingerprint.labels.foreground)[name])]
    voxels = extent / in_plane_length(fingerprint, plan.slice_axis, plan.in_plane_spacing)
    a_case = found.num_components / len(fingerprint.cases)
    if voxels >= LESION_VOXELS or a_case < SEVERAL:
        return None
    return f"{name!r} comes in {a_case:.1f} pieces a case, some only {voxels:.1f} voxels wide"


def _recipe(
    fingerprint: Fingerprint, plan: Plan, num_train: int, memory_bytes: int | None, abilities: Collection[Ability]
) -> tuple[str, str]:
    def too_large(name: str) -> str:
        """What a step of the recipe takes, where that is too much."""
        needed = memory_of(RECIPES[name](), plan)
        if memory_bytes is None or needed <= USABLE * memory_bytes:
            return ""
        return f"{format_bytes(needed)} a step, and there are {format_bytes(memory_bytes)}"

    slicewise, kept = "segdino_v2", "too few to adapt the backbone, which stays frozen"
    if num_train >= FEW_CASES:
        if "lora" not in abilities:
            kept = "but this backbone takes no LoRA and stays frozen"
        elif size := too_large("segdino_v2_lora"):
            kept = f"but adapting the backbone would take {size}; it stays frozen"
        else:
            slicewise, kept = "segdino_v2_lora", "enough to adapt the backbone"
    told = f"{num_train} to train on, {kept}"
    if plan.slice_axis is None:
        return slicewise, f"pictures, {told}"
    axis = plan.slice_axis
    ratio = fingerprint.median_spacing[axis] / in_plane_length(fingerprint, axis, plan.in_plane_spacing)
    num_slices = fingerprint.median_shape[axis]
    if num_slices < FEW_SLICES:
        return slicewise, f"{num_slices:.0f} slices a case: too few for a 3-D decoder; {told}"
    if ratio > THICK:
        return slicewise, f"slices lie {ratio:.1f} voxels apart: they are segmented one by one; {told}"
    if size := too_large("frozen_detail3d"):
        return slicewise, f"a 3-D decoder would take {size}; {told}"
    reason = f"volumes of {num_slices:.0f} slices, {ratio:.1f} in-plane voxels apart: a 3-D decoder"
    smallest = smallest_structure(fingerprint)
    if smallest is not None:
        reason += f", with every voxel in view for structures down to {smallest[1]:.3g} {fingerprint.cases[0].unit}"
    return "frozen_detail3d", reason
