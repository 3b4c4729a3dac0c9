"""The child that decodes compressed DICOM: decoders are native code, and a hostile file may end them, or eat memory.

Started as `python -m voxdino.core.dicom_child`. On its input: a line of JSON {"bytes", "frames", "allowed"}, then the
bytes of a DICOM file; on its output, for every frame: a line {"shape", "dtype"} and its values, or {"error"}.
"""

import io
import json
import os
import resource
import sys
import warnings
from typing import BinaryIO


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")  # what libraries print must not mix with the answers
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    questions = sys.stdin.buffer
    while line := questions.readline():
        question = json.loads(line)
        data = questions.read(question["bytes"])
        _limit_memory(question["allowed"])
        try:
            _decode(data, question["frames"], answers)
        except Exception as error:
            answers.write(json.dumps({"error": type(error).__name__}).encode() + b"\n")
        answers.flush()


def _decode(data: bytes, frames: list[int], answers: BinaryIO) -> None:
    import numpy as np
    from pydicom.filereader import dcmread
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import iter_pixels

    dataset = dcmread(io.BytesIO(data), force=True)
    for frame in iter_pixels(dataset, indices=frames):
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            frame = apply_color_lut(frame, dataset)
        values = np.ascontiguousarray(frame)
        answers.write(json.dumps({"shape": values.shape, "dtype": values.dtype.str}).encode() + b"\n")
        answers.write(values.tobytes())


def _limit_memory(allowed: int) -> None:
    """Let this process take `allowed` bytes more than it has now; where the system has no such limit, it has none."""
    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + allowed, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    main()
