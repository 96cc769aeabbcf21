"""The most memory that this process has held, as the operating system counts it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def reset_peaks() -> None:
    """Forget earlier peaks, where the system allows it."""
    # Sandboxes may mount /proc read-only; the peak then covers the whole process, never less.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak_bytes() -> int:
    """Return the most bytes that CUDA tensors have held since the last reset."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
