"""How much memory a training step takes: measured in a child process, which loads torch while we do other work."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from voxdino.core import errors
from voxdino.core.errors import ResourceError, VoxdinoError
from voxdino.core.safe_files import format_bytes

_MOST_SAMPLES = {"cpu": 16, "cuda": 64}  # larger batches learn less per sample seen
_USABLE = 0.7  # of the free memory: the rest is for the loader, the optimiser's peaks and other programs


@dataclass(frozen=True)
class BackboneFacts:
    """What a plan needs to know of a backbone. device: where training would run on this machine."""

    name: str
    patch_size: int
    num_parameters: int
    device: Literal["cpu", "cuda"]


class BackboneProbe:
    """A child process that knows the backbone. Start it early, ask late: it loads torch meanwhile.

    Errors (of the questions): WeightsError, UsageError for a backbone that cannot be had; ResourceError when the child
    dies.
    """

    def __init__(self, backbone: str) -> None:
        self._backbone = backbone
        self._facts: BackboneFacts | None = None
        command = [sys.executable, "-m", "voxdino.preparation.memory_child", backbone]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside our own workers, two threads wait for each other
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread
        )

    def __enter__(self) -> "BackboneProbe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def describe(self) -> BackboneFacts:
        """Errors: see the class."""
        if self._facts is None:
            answer = self._answer()
            self._facts = BackboneFacts(
                self._backbone.rpartition("/")[2], answer["patch_size"], answer["num_parameters"], answer["device"]
            )
        return self._facts

    def choose_batch(
        self, input_size: tuple[int, int], input_builder: str, num_channels: int, num_outputs: int, slab: int
    ) -> tuple[int, str]:
        """The batch size that fits, and the numbers it follows from: a straight line through two measured steps.

        One step suffices where the largest batch would fit even if a sample took all the memory of that step.
        """
        facts = self.describe()
        most = _MOST_SAMPLES[facts.device]
        try:
            measured = self._ask(
                input_size=input_size,
                input_builder=input_builder,
                num_channels=num_channels,
                num_outputs=num_outputs,
                slab=slab,
                most=most,
                usable=_USABLE,
            )
        except ResourceError as error:
            return 1, f"the measured training step failed ({error.fact}): one sample at a time."
        fixed = measured["fixed"] + 12 * facts.num_parameters  # gradients and Adam's moments
        fitting = int((_USABLE * measured["free"] - fixed) / measured["per_sample"])
        return max(1, min(most, fitting)), (
            f"measured on {facts.device}: {format_bytes(measured['per_sample'])} per sample of "
            f"{input_size[0]} x {input_size[1]} px and {format_bytes(fixed)} besides, with "
            f"{format_bytes(measured['free'])} free: {max(0, fitting)} would fit; at most {most}."
        )

    def _ask(self, **question: Any) -> Any:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._death() from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["error"], VoxdinoError)
            raise kind(answer["fact"], where=answer["where"], fix=answer["fix"])
        return answer

    def _death(self) -> ResourceError:
        code = self._process.wait()
        fact = f"the child process that measures memory ended ({f'signal {-code}' if code < 0 else f'code {code}'})."
        return ResourceError(fact, fix="free memory, or name a smaller --backbone (voxdino list backbones).")
