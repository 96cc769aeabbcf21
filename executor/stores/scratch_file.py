"""A file for the KV cache and hidden states of a run, which is removed with the run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from executor.machine.offload_folder import SCRATCH_PREFIX
from profiles.aligned_io import DirectFile, Parts


class ScratchFile:
    """A direct-I/O file without a name, so that no crash leaves it behind.

    Where the file system cannot make unnamed files, the name is removed at once.
    """

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder, prefix=SCRATCH_PREFIX) as unnamed:
            self._file = DirectFile(Path(f"/proc/self/fd/{unnamed.fileno()}"), writable=True)
        # For messages: the name in /proc means nothing to a reader.
        self._file.path = folder / "(cache and hidden states)"

    def read_into(self, buffer: torch.Tensor, position: int) -> None:
        """Fill ``buffer`` (uint8, on a page, whole pages long) from ``position``."""
        self._file.read_into(buffer.numpy().data, position)

    def write_from(self, buffer: torch.Tensor, position: int) -> None:
        """Write ``buffer`` (uint8, on a page, whole pages long) at ``position``."""
        self._file.write_from(buffer.numpy().data, position)

    def read_runs(self, buffer: torch.Tensor, runs: Sequence[slice], position: int) -> None:
        """Fill several runs of ``buffer``, whose image in the file begins at ``position``."""
        self._file.read_parts(_parts(buffer, runs, position))

    def write_runs(self, buffer: torch.Tensor, runs: Sequence[slice], position: int) -> None:
        """Write several runs of ``buffer``, whose image in the file begins at ``position``."""
        self._file.write_parts(_parts(buffer, runs, position))

    def close(self) -> None:
        """Close the file and free its space."""
        self._file.close()

    def __enter__(self) -> ScratchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parts(buffer: torch.Tensor, runs: Sequence[slice], position: int) -> Parts:
    data = buffer.numpy().data
    return [(data[run], position + run.start) for run in runs]
