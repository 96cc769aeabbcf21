"""Reads of the bytes of safetensors files.

Files are read and not mapped, because mapped pages count as resident memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from costmodel.model.tensor_entry import TensorEntry
from profiles.errors import RunError
from profiles.units import MIB

READ_BYTES = 16 * MIB


def read_into(path: Path, offset_bytes: int, target: memoryview) -> None:
    """Fill ``target`` from the file, and drop the read pages from the page cache."""
    try:
        with path.open("rb", buffering=0) as handle:
            done = 0
            while done < len(target):
                piece = target[done : done + READ_BYTES]
                got = os.preadv(handle.fileno(), [piece], offset_bytes + done)
                if got == 0:
                    raise RunError(f"shard {path}: it became shorter while it was read")
                os.posix_fadvise(handle.fileno(), offset_bytes + done, got, os.POSIX_FADV_DONTNEED)
                done += got
    except OSError as error:
        raise RunError(f"shard {path}: cannot be read ({error.strerror})") from error


def read_rows(path: Path, offset_bytes: int, stride_bytes: int, target: npt.NDArray[Any]) -> None:
    """Fill each row of ``target``, uint8 [rows, bytes], from places in the file that are
    ``stride_bytes`` apart.

    What is between the rows is read ahead with them, and stays in the page cache.
    """
    try:
        with path.open("rb", buffering=0) as handle:
            descriptor = handle.fileno()
            span = (len(target) - 1) * stride_bytes + target.shape[1]
            os.posix_fadvise(descriptor, offset_bytes, span, os.POSIX_FADV_WILLNEED)
            for number, row in enumerate(target):
                if os.preadv(descriptor, [row], offset_bytes + number * stride_bytes) < len(row):
                    raise RunError(f"shard {path}: it became shorter while it was read")
    except OSError as error:
        raise RunError(f"shard {path}: cannot be read ({error.strerror})") from error


def drop_pages(entry: TensorEntry) -> None:
    """Drop the pages of a tensor from the page cache."""
    try:
        with entry.path.open("rb", buffering=0) as handle:
            os.posix_fadvise(
                handle.fileno(), entry.offset_bytes, entry.num_bytes, os.POSIX_FADV_DONTNEED
            )
    except OSError as error:
        raise RunError(f"shard {entry.path}: cannot be read ({error.strerror})") from error
