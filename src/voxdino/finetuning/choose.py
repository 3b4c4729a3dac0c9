"""The recipe `auto`: which of the recipes suits a data set, decided from its facts, with the reason."""

from voxdino.preparation.decisions import in_plane_length, smallest_structure
from voxdino.preparation.fingerprint import Fingerprint
from voxdino.preparation.plan import Plan

FEW_CASES = 20  # below, adapting the backbone learns the cases by heart
THICK = 5.0  # slice distance over in-plane spacing from which on neighbouring slices tell little about each other
FEW_SLICES = 8  # a 3-D decoder needs more


def choose_recipe(fingerprint: Fingerprint, plan: Plan, *, num_train: int) -> tuple[str, str]:
    """(name in RECIPES, reason).

    num_train: cases to train on.
    """
    if plan.slice_axis is None:
        if num_train < FEW_CASES:
            return "segdino_v2", f"pictures, only {num_train} to train on: the backbone stays frozen."
        return "segdino_v2_lora", f"pictures, {num_train} to train on: enough to adapt the backbone."
    axis = plan.slice_axis
    ratio = fingerprint.median_spacing[axis] / in_plane_length(fingerprint, axis, plan.in_plane_spacing)
    num_slices = fingerprint.median_shape[axis]
    if num_slices < FEW_SLICES:
        return "segdino_v2_lora", f"{num_slices:.0f} slices a case: too few for a 3-D decoder."
    if ratio > THICK:
        return "segdino_v2_lora", f"slices lie {ratio:.1f} voxels apart: they are segmented one by one."
    told = f"volumes of {num_slices:.0f} slices, {ratio:.1f} in-plane voxels apart: a 3-D decoder"
    smallest = smallest_structure(fingerprint)
    if smallest is not None:
        told += f", with every voxel in view for structures down to {smallest[1]:.3g} {fingerprint.cases[0].unit}"
    return "frozen_detail3d", f"{told}."
