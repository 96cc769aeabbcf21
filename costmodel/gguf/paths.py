"""Which paths name models in GGUF."""

from __future__ import annotations

from pathlib import Path

from profiles.errors import InputError


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its suffix."""
    return path.suffix == ".gguf"


def refuse_gguf_folder(folder: Path) -> None:
    """Refuse a folder that has GGUF files and no ``config.json``: the file is the model."""
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if files and not (folder / "config.json").exists():
        raise InputError(
            f"model {folder}",
            got="a folder without config.json",
            allowed="a Hugging Face folder, or a GGUF file",
            hint=str(files[0]),
        )
