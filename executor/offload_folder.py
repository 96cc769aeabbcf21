"""The folder that holds what lives on disk: checked before any work."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from profiles.errors import InputError
from profiles.units import format_bytes


def check_offload_folder(folder: Path, needed_bytes: int) -> None:
    """Raise ``InputError`` unless ``needed_bytes`` can be written into ``folder``."""
    # The folder itself is made only once it is known to do.
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        raise InputError(
            f"--offload-dir {folder}", got=error.strerror, allowed="a folder that can be written"
        ) from error
    if free_bytes >= needed_bytes:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        raise InputError(
            f"--offload-dir {folder}",
            got=f"{format_bytes(free_bytes)} free",
            allowed=f"at least {format_bytes(needed_bytes)}, which this policy puts on disk",
            hint="another folder, or searching again with --disk",
        )
