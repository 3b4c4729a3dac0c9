"""The recipe `auto`: which of the recipes suits a data set, decided from its facts, with the reason."""

from voxdino.core.safe_files import format_bytes
from voxdino.finetuning.cost import memory_of
from voxdino.finetuning.recipes import RECIPES
from voxdino.preparation.decisions import in_plane_length, smallest_structure
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.plan import Plan

FEW_CASES = 20  # below, adapting the backbone learns the cases by heart
THICK = 5.0  # slice distance over in-plane spacing from which on neighbouring slices tell little about each other
USABLE = 0.6  # of the memory
FEW_SLICES = 8  # a 3-D decoder needs more


def choose_recipe(
    fingerprint: Fingerprint, plan: Plan, *, num_train: int, memory_bytes: int | None = None
) -> tuple[str, str]:
    """(name in RECIPES, reason).

    num_train:    cases to train on.
    memory_bytes: that there are; None: enough.
    """
    slicewise, kept = "segdino_v2_lora", "enough to adapt the backbone"
    if num_train < FEW_CASES:
        slicewise, kept = "segdino_v2", "too few to adapt the backbone, which stays frozen"
    told = f"{num_train} to train on, {kept}"
    if plan.slice_axis is None:
        return slicewise, f"pictures, {told}."
    axis = plan.slice_axis
    ratio = fingerprint.median_spacing[axis] / in_plane_length(fingerprint, axis, plan.in_plane_spacing)
    num_slices = fingerprint.median_shape[axis]
    if num_slices < FEW_SLICES:
        return slicewise, f"{num_slices:.0f} slices a case: too few for a 3-D decoder; {told}."
    if ratio > THICK:
        return slicewise, f"slices lie {ratio:.1f} voxels apart: they are segmented one by one; {told}."
    needed = memory_of(RECIPES["frozen_detail3d"](), plan)
    if memory_bytes is not None and needed > USABLE * memory_bytes:
        size = f"{format_bytes(needed)} a step, and there are {format_bytes(memory_bytes)}"
        return slicewise, f"a 3-D decoder would take {size}; {told}."
    reason = f"volumes of {num_slices:.0f} slices, {ratio:.1f} in-plane voxels apart: a 3-D decoder"
    smallest = smallest_structure(fingerprint)
    if smallest is not None:
        reason += f", with every voxel in view for structures down to {smallest[1]:.3g} {fingerprint.cases[0].unit}"
    return "frozen_detail3d", f"{reason}."
