"""The stored values of DICOM frames: plain ones straight from the file, compressed ones from a child process."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom.filereader import dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from voxdino.core.errors import ImageError, ResourceError
from voxdino.core.io.dicom.headers import Instance, open_file, parsing

_MOST_THREADS = 8
_FILES_PER_THREAD = 16  # below which another thread, and its decoder, costs more than it brings
_PIXEL_TAGS = ((0x7FE0, 0x0010), (0x7FE0, 0x0008), (0x7FE0, 0x0009))
_SLACK_BYTES = 512 << 20  # libraries that a decoder loads
_COPIES = 6  # of frame and file that decoders hold
_PATIENCE_S = 120.0
_AGAIN = "copy or export it again."

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Frames:
    """Frames of one file that are wanted, and where each goes: `targets` are positions in the stack."""

    instance: Instance
    indices: tuple[int, ...]
    targets: tuple[int, ...]


def read_frames(wanted: Sequence[Frames], take: Callable[[int, Instance, NDArray[Any]], None]) -> None:
    """Call take(target, instance, stored values (rows, columns) or (rows, columns, 3)) for every frame, in threads.

    Errors: ImageError for damaged pixel data; ResourceError where the decoder is not installed.
    """
    for syntax in {frames.instance.syntax for frames in wanted}:
        _require_decoder(syntax, next(frames.instance for frames in wanted if frames.instance.syntax == syntax))
    with _decoders(num_threads(len(wanted))) as decoders:

        def read(frames: Frames) -> None:
            for target, values in zip(frames.targets, _stored(frames, decoders), strict=True):
                _require_declared(values, frames.instance)
                take(target, frames.instance, values)

        map_files(read, wanted)


def map_files(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of every item, in threads where there are many: most of the time goes to the disk, or to children."""
    count = num_threads(len(items))
    if count == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, items))


def num_threads(num_files: int) -> int:
    """As many as there are processors, but none for a few files."""
    return max(1, min(_MOST_THREADS, num_files // _FILES_PER_THREAD, available_cpus()))


def available_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_packages(syntax: str) -> list[str] | None:
    """What to install to decode a transfer syntax: [] where nothing is missing, None where nothing can be done."""
    uid = UID(syntax)
    if not uid.is_transfer_syntax:
        return None
    if not uid.is_encapsulated:
        return []
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        return None
    return [] if decoder.is_available else [text.split(" - ")[0] for text in decoder.missing_dependencies]


def _require_decoder(syntax: str, instance: Instance) -> None:
    missing = missing_packages(syntax)
    name = UID(syntax).name if UID(syntax).is_transfer_syntax else "an unknown transfer syntax"
    if missing is None:
        fact = f"its images are stored as {name}, which we do not read."
        raise ImageError(fact, where=instance.place.where, fix="export it uncompressed, or as JPEG 2000 or JPEG-LS.")
    if missing:
        fact = f"its images are compressed as {name}, and no decoder for it is installed."
        fix = f"pip install 'voxdino[dicom]' (one of {', '.join(missing)})."
        raise ResourceError(fact, where=instance.place.where, fix=fix)


def _require_declared(values: NDArray[Any], instance: Instance) -> None:
    """A decoder may end well and give a wrong image: ImageError where it is not what the header describes."""
    is_colour = instance.samples == 3 or instance.photometric == "PALETTE COLOR"
    if values.shape != (instance.rows, instance.columns) + (3,) * is_colour:
        fact = f"its pixel data decodes to {' x '.join(map(str, values.shape))}, not to the size that it declares."
        raise ImageError(fact, where=instance.place.where, fix=_AGAIN)
    is_kind = values.dtype.kind == _kind_of(instance)
    if not is_colour and not (is_kind and 8 * values.dtype.itemsize <= max(8, instance.bits_allocated)):
        fact = f"its pixel data decodes to {values.dtype}, not to the values that it declares."
        raise ImageError(fact, where=instance.place.where, fix=_AGAIN)


def _kind_of(instance: Instance) -> str:
    """NumPy's letter for the declared values of grey images."""
    return "f" if instance.is_float else "i" if instance.is_signed else "u"


def _stored(frames: Frames, decoders: "queue.SimpleQueue[_Child]") -> Iterator[NDArray[Any]]:
    instance = frames.instance
    if UID(instance.syntax).is_encapsulated:
        child = decoders.get()
        try:
            yield from child.decode(frames)
        finally:
            decoders.put(child)
    elif instance.samples == 1 and instance.photometric.startswith("MONOCHROME"):
        yield from _plain(frames)
    else:
        yield from _plain_colour(frames)


def _plain(frames: Frames) -> Iterator[NDArray[Any]]:
    """Uncompressed grey values (rows, columns), bits beyond those stored cleared."""
    instance = frames.instance
    num_bits = instance.rows * instance.columns * instance.bits_allocated
    with open_file(instance.place) as file:
        file.seek(instance.pixel_offset)
        begin, length = _payload(file.read(12), instance)
        for index in frames.indices:
            first, last = index * num_bits // 8, -(-(index + 1) * num_bits // 8)
            file.seek(begin + first)
            data = file.read(last - first)
            if last > length or len(data) < last - first:
                have = min(length, first + len(data))
                fact = f"truncated: {have} bytes of pixel data, {instance.num_frames * num_bits // 8} are declared."
                raise ImageError(fact, where=instance.place.where, fix=_AGAIN)
            if instance.bits_allocated == 1:
                bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
                bits = bits[index * num_bits % 8 :][: instance.rows * instance.columns]
                yield bits.reshape(instance.rows, instance.columns)
                continue
            if instance.bits_allocated == 8 and not instance.is_little:
                data = _swapped(file, begin, first, last)
            dtype = np.dtype(f"{'<' if instance.is_little else '>'}{_kind_of(instance)}{instance.bits_allocated // 8}")
            values = np.frombuffer(data, dtype).reshape(instance.rows, instance.columns)
            unused = instance.bits_allocated - instance.bits_stored
            values = values.astype(dtype.newbyteorder("="), copy=bool(unused))
            yield (values << unused) >> unused if unused else values


def _swapped(file: Any, begin: int, first: int, last: int) -> bytes:
    """Bytes first..last of 8-bit pixels that were written as big-endian words of 16 bits."""
    file.seek(begin + first // 2 * 2)
    words = file.read(-(-last // 2) * 2 - first // 2 * 2)
    return bytes(np.frombuffer(words, ">u2").astype("<u2").tobytes()[first % 2 :][: last - first])


def _payload(head: bytes, instance: Instance) -> tuple[int, int]:
    """Where the pixel data element's value begins, and how long it says that it is."""
    order = "little" if instance.is_little else "big"
    tag = (int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order))  # type: ignore[arg-type]
    if len(head) < 12 or tag not in _PIXEL_TAGS:
        raise ImageError("has no pixel data.", where=instance.place.where, fix=_AGAIN)
    at = 4 if instance.is_implicit else 8
    return instance.pixel_offset + at + 4, int.from_bytes(head[at : at + 4], order)  # type: ignore[arg-type]


def _plain_colour(frames: Frames) -> Iterator[NDArray[Any]]:
    """Uncompressed colour (rows, columns, 3) as RGB, palettes looked up."""
    with parsing(frames.instance.place.where), open_file(frames.instance.place) as file:
        dataset = dcmread(file, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = UID(frames.instance.syntax)
        for index in frames.indices:
            values = pixel_array(dataset, index=index)
            if frames.instance.photometric == "PALETTE COLOR":
                values = apply_color_lut(values, dataset)
            yield values


@contextmanager
def _decoders(most: int) -> Iterator["queue.SimpleQueue[_Child]"]:
    """As many children as threads, each started when it is first asked."""
    children = [_Child() for _ in range(most)]
    free: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    for child in children:
        free.put(child)
    try:
        yield free
    finally:
        for child in children:
            child.close()


@dataclass
class _Child:
    """A `dicom_child` process, or the promise of one."""

    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def decode(self, frames: Frames) -> Iterator[NDArray[Any]]:
        """Decoded frames. Errors: ImageError where the data cannot be decoded, or the child died of it."""
        instance = frames.instance
        with instance.place.open() as file:
            data = file.read()
        num_bytes = instance.rows * instance.columns * max(1, instance.bits_allocated // 8) * 3
        allowed = _COPIES * (num_bytes + len(data)) + _SLACK_BYTES
        question = {"bytes": len(data), "frames": list(frames.indices), "allowed": allowed}
        process = self._start()
        watch = threading.Timer(_PATIENCE_S * (1 + len(frames.indices) / 100), process.kill)
        watch.start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.write(data)
            process.stdin.flush()
            for _ in frames.indices:
                yield self._answer(process, num_bytes, instance)
        except OSError as error:
            raise self._failed(instance, "its decoder ended early") from error
        finally:
            watch.cancel()

    def _answer(self, process: "subprocess.Popen[bytes]", most: int, instance: Instance) -> NDArray[Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"error": "its decoder ended early"}
        if "error" in answer:
            raise self._failed(instance, answer["error"])
        dtype = np.dtype(answer["dtype"])
        count = int(np.prod(answer["shape"]))
        if dtype.kind not in "iuf" or count * dtype.itemsize > max(most, 1 << 20):
            raise self._failed(instance, "larger than declared")
        data = process.stdout.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise self._failed(instance, "its decoder ended early")
        return np.frombuffer(data, dtype).reshape(answer["shape"])

    def _failed(self, instance: Instance, reason: str) -> ImageError:
        self.close()
        name = UID(instance.syntax).name
        return ImageError(f"its {name} data cannot be decoded ({reason}).", where=instance.place.where, fix=_AGAIN)

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            command = [sys.executable, "-m", "voxdino.core.dicom_child"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
