"""A tensor in a file of weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file; ``offset_bytes`` counts from the start of the file.

    ``dtype`` is the format's name, such as ``BF16``. It may be unknown here.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int
