"""The folder for data on disk: checked before any work, and kept clean."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from profiles.errors import InputError
from profiles.mounts import memory_file_system
from profiles.units import format_bytes
from profiles.whole_file import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, remove_leftover

logger = logging.getLogger(__name__)

# Of what ``stat`` counts, whatever a file system's blocks are.
BLOCK_BYTES = 512
# Peculiar, because leftovers are found, and removed, by their names.
WEIGHTS_PREFIX = "zigzag-weights-"
WEIGHTS_SUFFIX = ".bin"
MANIFEST_SUFFIX = ".json"
SCRATCH_PREFIX = ".zigzag-scratch-"


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


def bytes_in_memory(folder: Path, needed_bytes: int, weight_file: Path | None) -> int:
    """Return how much memory a run will fill by writing to the folder: nothing where it is on a
    disk; else what it needs there, less what an earlier run has left in the weight file."""
    kind = memory_file_system(folder)
    if kind is None or needed_bytes == 0:
        return 0
    logger.warning(
        "--offload-dir %s is in memory (%s): what is there counts as cpu memory", folder, kind
    )
    kept = weight_file.stat().st_blocks * BLOCK_BYTES if weight_file and weight_file.exists() else 0
    return max(0, needed_bytes - kept)


def remove_orphans(folder: Path) -> None:
    """Remove what killed processes have left in the folder; what a live one holds stays.

    These are temporary files, and weight files without a manifest: whoever builds one holds its
    lock.
    """
    for pattern in (f"{SCRATCH_PREFIX}*", f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        for path in folder.glob(pattern):
            remove_leftover(path)
    for path in folder.glob(f"{WEIGHTS_PREFIX}*{WEIGHTS_SUFFIX}"):
        remove_leftover(path, unless=path.with_suffix(MANIFEST_SUFFIX))
