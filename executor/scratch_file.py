"""A file for what a run keeps on disk only while it runs: KV cache and hidden states."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from profiles.aligned_io import DirectFile


class ScratchFile:
    """A direct-I/O file without a name: it is unlinked at once, so no crash leaves it behind."""

    def __init__(self, folder: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".zigzag-scratch-")
        os.close(descriptor)
        path = Path(name)
        try:
            self._file = DirectFile(path, writable=True)
        finally:
            path.unlink()

    def read_into(self, buffer: torch.Tensor, position: int) -> None:
        """Fill ``buffer`` (uint8, on a page, whole pages long) from ``position``."""
        self._file.read_into(buffer.numpy().data, position)

    def write_from(self, buffer: torch.Tensor, position: int) -> None:
        """Write ``buffer`` (uint8, on a page, whole pages long) at ``position``."""
        self._file.write_from(buffer.numpy().data, position)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def __enter__(self) -> ScratchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
