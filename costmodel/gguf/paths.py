"""Which paths name models in GGUF."""

from __future__ import annotations

from pathlib import Path

from costmodel.gguf.header import MAGIC
from profiles.errors import InputError


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its suffix or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def refuse_gguf_folder(folder: Path) -> None:
    """Refuse a folder of GGUF files without other weights: the file is the model, whatever a
    ``config.json`` beside it says."""
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if files and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model {folder}",
            got="a folder of GGUF files",
            allowed="a Hugging Face folder, or a GGUF file",
            hint=str(files[0]),
        )
