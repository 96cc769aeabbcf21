"""Opens the weights of a model: a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.gguf_checkpoint import GgufCheckpoint
from profiles.errors import InputError

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
    if model.suffix == ".gguf":
        return GgufCheckpoint.open(model, dtype)
    files = sorted(model.glob("*.gguf")) if model.is_dir() else []
    if files and not (model / "config.json").exists():
        raise InputError(
            f"model {model}",
            got="a folder without config.json",
            allowed="a Hugging Face folder, or a GGUF file",
            hint=str(files[0]),
        )
    return Checkpoint.open(model, dtype)
