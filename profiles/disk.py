"""The disk tier: free bytes, and reads and writes past the page cache."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer
from profiles.errors import InputError
from profiles.hardware import Disk
from profiles.rate_curve import RateCurve
from profiles.repeats import Repeater
from profiles.timing import Measurement, seconds_of
from profiles.units import KIB, MIB, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What is tried on a disk.

    Parameters
    ----------
    file_bytes
        Size of the file that is written and read.
    chunk_bytes
        Most bytes of one sample.
    request_bytes
        Sizes of one request.
    depths
        Numbers of threads that have a request under way at once.
    """

    file_bytes: int
    chunk_bytes: int
    request_bytes: tuple[int, ...]
    depths: tuple[int, ...]


QUICK_PLAN = DiskPlan(
    file_bytes=256 * MIB,
    chunk_bytes=64 * MIB,
    request_bytes=(64 * KIB, MIB, 4 * MIB),
    depths=(1, 4),
)
FULL_PLAN = DiskPlan(
    file_bytes=1024 * MIB,
    chunk_bytes=128 * MIB,
    request_bytes=(64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB),
    depths=(1, 2, 4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFile:
    """A file of noise, as many whole chunks as its plan asks for, and a buffer of one chunk."""

    path: Path
    chunk: memoryview
    num_bytes: int


def measure_disk(offload_dir: Path, plan: DiskPlan, repeater: Repeater) -> Disk:
    """Measure the disk under ``offload_dir`` with a file that is removed whatever happens.

    The curves keep the best depth at each request size; the samples of all depths stay in the
    repeater's measurements.

    Raises
    ------
    InputError
        When the folder is missing, cannot be written, or has no room for the file.
    """
    free_bytes = free_disk_bytes(offload_dir)
    with noise_file(offload_dir, plan) as test_file:
        return Disk(
            free_bytes=free_bytes,
            read=_curve("read", test_file, plan, repeater),
            write=_curve("write", test_file, plan, repeater),
        )


@contextlib.contextmanager
def noise_file(offload_dir: Path, plan: DiskPlan) -> Iterator[NoiseFile]:
    """Write a plan's file, and remove it at the end whatever happens.

    Raises
    ------
    InputError
        When the folder is missing, cannot be written, or has no room for the file.
    """
    free_bytes = free_disk_bytes(offload_dir)
    # Half of a nearly full disk is left alone.
    file_bytes = min(plan.file_bytes, free_bytes // 2 // PAGE_BYTES * PAGE_BYTES)
    if file_bytes < max(plan.request_bytes):
        raise InputError(
            f"offload folder {offload_dir}",
            got=f"{format_bytes(free_bytes)} free",
            allowed=f"at least {format_bytes(2 * max(plan.request_bytes))} free",
            hint="another --offload-dir",
        )
    chunk = aligned_buffer(min(plan.chunk_bytes, file_bytes))
    _fill_with_noise(chunk)
    num_bytes = file_bytes // len(chunk) * len(chunk)
    with _temporary_file(offload_dir) as path:
        with DirectFile(path, writable=True) as file:
            file.preallocate(file_bytes)
            for offset in range(0, num_bytes, len(chunk)):
                file.write_from(chunk, offset)
        yield NoiseFile(path=path, chunk=chunk, num_bytes=num_bytes)


def free_disk_bytes(offload_dir: Path) -> int:
    """Return the free bytes under a folder, after making sure that it can be written."""
    allowed = "an existing folder that can be written"
    label = f"offload folder {offload_dir}"
    if not offload_dir.is_dir():
        raise InputError(label, got="no such folder", allowed=allowed, hint=f"mkdir {offload_dir}")
    try:
        with tempfile.TemporaryFile(dir=offload_dir):
            pass
    except OSError as error:
        raise InputError(label, got=error.strerror, allowed=allowed) from error
    return shutil.disk_usage(offload_dir).free


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".zigzag-measure-") as handle:
        yield Path(handle.name)


def _fill_with_noise(buffer: memoryview) -> None:
    # Noise, so that a disk that compresses or shares equal blocks gains nothing by it. Pieces
    # repeat at a distance that no disk looks back over.
    piece = random.Random(0).randbytes(min(16 * MIB, len(buffer)))
    for start in range(0, len(buffer), len(piece)):
        end = min(start + len(piece), len(buffer))
        buffer[start:end] = piece[: end - start]


def _curve(verb: str, test_file: NoiseFile, plan: DiskPlan, repeater: Repeater) -> RateCurve:
    best = [
        max(_measure_requests(verb, test_file, size, n, repeater).median for n in plan.depths)
        for size in plan.request_bytes
    ]
    return RateCurve(sizes=tuple(float(s) for s in plan.request_bytes), rates=tuple(best))


def _measure_requests(
    verb: str, test_file: NoiseFile, size: int, depth: int, repeater: Repeater
) -> Measurement:
    chunk = test_file.chunk
    with DirectFile(test_file.path, writable=True, num_threads=depth, request_bytes=size) as file:
        move = file.read_into if verb == "read" else file.write_from
        # A slow disk moves less than a chunk in the time of one sample.
        least = min(size * depth, len(chunk))
        seconds = seconds_of(lambda: move(chunk[:least], 0), repeats=1)[0]
        wanted = int(least * repeater.effort.sample_s / seconds)
        num_bytes = max(least, min(len(chunk), wanted) // least * least)
        offsets = itertools.cycle(range(0, test_file.num_bytes - num_bytes + 1, num_bytes))
        return repeater.measure_rate(
            f"disk.{verb}.{size // KIB}KiB.depth{depth}",
            "bytes_per_s",
            lambda: move(chunk[:num_bytes], next(offsets)),
            num_bytes,
        )
