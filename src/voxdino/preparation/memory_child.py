"""The child of `memory.BackboneProbe`: loads torch and the backbone, answers in JSON lines, measures training steps.

Started as `python -m voxdino.preparation.memory_child BACKBONE`; ends when its input ends.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from voxdino.core.errors import ResourceError, VoxdinoError, WeightsError
from voxdino.core.memory import available_memory
from voxdino.core.records import nearest

_STEPS = {"cpu": (1, 2), "cuda": (2, 6)}  # batch sizes measured
_MOST_PARAMETERS = 2_000_000_000


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print must not mix with the answers
    os.dup2(2, 1)
    try:
        free = available_memory()
        backbone, facts = _open(sys.argv[1])
        answers.write(json.dumps(facts) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(_measure(backbone, facts["device"], free, **json.loads(line))) + "\n")
    except VoxdinoError as error:
        answer = {"error": type(error).__name__, "fact": error.fact, "where": error.where, "fix": error.fix}
        answers.write(json.dumps(answer) + "\n")


def _open(source: str) -> tuple[Any, dict[str, Any]]:
    """The backbone, trained weights where `source` has them, and what the parent wants to know of it."""
    import torch

    from voxdino.models.backbones.build import build_backbone
    from voxdino.models.registry import BACKBONES
    from voxdino.models.weights import load_backbone

    name = source.removeprefix("random:")
    if name in BACKBONES and not Path(source).exists():
        with torch.device("meta"):
            backbone = build_backbone(BACKBONES[name])
    else:
        try:
            backbone = load_backbone(source)[0]
        except WeightsError as error:
            hint = nearest(name, BACKBONES) if error.where == source else ""  # a name, not a file
            raise WeightsError(f"{error.fact}{hint}", where=error.where, fix=error.fix) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return backbone, {"patch_size": backbone.patch_size, "num_parameters": num_parameters, "device": device}


def _measure(
    backbone: Any,
    device: str,
    free: int,
    *,
    input_size: tuple[int, int],
    input_builder: str,
    num_channels: int,
    num_outputs: int,
    slab: int,
    most: int,
    usable: float,
) -> dict[str, Any]:
    """Bytes per sample and besides, from a forward and backward pass at one batch size or two.

    LoRA is what is measured: its activations are those of full fine-tuning, which is measured where there is no LoRA;
    without a backbone it is the U-Net. After the first pass all that it added is taken for the sample's; where `most`
    samples of that size stay within `usable` of the memory, that will do.
    """
    import torch

    from voxdino.models.compose import build_segmenter
    from voxdino.models.registry import INPUT_BUILDERS
    from voxdino.models.segmenter import ModelConfig

    if sum(parameter.numel() for parameter in backbone.parameters()) > _MOST_PARAMETERS:
        raise ResourceError("the backbone is too large to try it here")
    if any(parameter.is_meta for parameter in backbone.parameters()):
        backbone = backbone.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*backbone.parameters(), *backbone.buffers()):
                tensor.zero_()
    context = INPUT_BUILDERS[input_builder].context_slices
    decoder = "tpa_sad" if len(backbone.default_taps()) >= 4 else "linear"
    if backbone.depth == 0:
        decoder = "unet_3d" if slab > 1 else "unet_2d"
    config = ModelConfig(
        backbone="probe",
        input_builder=input_builder,
        context_slices=context,
        num_channels=num_channels,
        magnification=1.0,
        num_outputs=num_outputs,
        decoder=decoder,
        adaptation="frozen" if backbone.depth == 0 else "lora" if "lora" in backbone.abilities else "full",
    )
    segmenter = build_segmenter(config, backbone).to(device).train()
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    fixed, per_sample, before = _peak_memory(device), 1, 0
    for batch in _STEPS[device]:
        image = torch.zeros(batch, num_channels, slab + 2 * context, *input_size, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = segmenter(image).logits
        logits.float().square().mean().backward()
        segmenter.zero_grad()
        del image, logits
        peak = _peak_memory(device)
        if before:  # the second pass: a straight line through both
            per_sample = max(1, (peak - before) // (batch - _STEPS[device][0]))
            fixed = max(0, before - _STEPS[device][0] * per_sample)
            break
        per_sample, before = max(1, (peak - fixed) // batch), peak
        if fixed + most * per_sample < usable * free:
            break
    return {"per_sample": per_sample, "fixed": fixed, "free": free}


def _peak_memory(device: str) -> int:
    """The most memory this process ever had, in bytes: of the GPU, or of the machine."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
