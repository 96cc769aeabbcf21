"""Opens the weights of a model: a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from costmodel.gguf.paths import is_gguf, refuse_gguf_folder
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.gguf_checkpoint import GgufCheckpoint

OpenedCheckpoint = Checkpoint | GgufCheckpoint


def open_checkpoint(model: Path, dtype: str | None = None) -> OpenedCheckpoint:
    """Open a folder, or a GGUF file with all of its parts.

    Parameters
    ----------
    dtype
        The compute dtype; ``None`` stands for that of the folder, and for bfloat16 of a GGUF file.

    Raises
    ------
    InputError
        Naming the file or tensor, the value found and the allowed ones.
    """
    if is_gguf(model):
        return GgufCheckpoint.open(model, dtype)
    refuse_gguf_folder(model)
    return Checkpoint.open(model, dtype)
