"""What can go wrong before a command begins: libraries that a machine has no room to load."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from profiles.errors import one_line

COMMANDS = ("profiles.", "costmodel.", "executor.")
NO_MEMORY = (
    "memory: the system gives this process no more; try: raise its limits (ulimit -v and -d), or a"
    " smaller --cpu-memory"
)
# Python, the loader and torch tell a machine that gives no more by the text alone.
_EXHAUSTED = {
    "can't start new thread": "the system gives this process no more threads; try: raise the limits"
    " of processes (ulimit -u) and of memory (ulimit -v)",
    "can't allocate memory": NO_MEMORY,
    "not enough memory": NO_MEMORY,
    "failed to map segment": NO_MEMORY,
    "cannot allocate memory": NO_MEMORY,
}


def called(module: str) -> str:
    """Return how the user calls a command: by ``zigzag`` where it started this process."""
    if Path(sys.argv[0]).stem == "zigzag":
        return f"zigzag {module.rpartition('.')[2]}"
    return f"python -m {module}"


def told_exhaustion(error: BaseException) -> str | None:
    """Return what to tell where a machine gives no more memory or threads, else ``None``."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    return next((told for text, told in _EXHAUSTED.items() if text in str(error)), None)


def tell_failed_imports() -> None:
    """Have a command that cannot be imported end in one line.

    Its packages are imported before any code of its own runs, which could catch what they raise.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if module.startswith(COMMANDS):
        sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    told = told_exhaustion(error)
    if told is None and isinstance(error, ImportError):
        told = one_line(str(error))
    if told is None and isinstance(error, KeyboardInterrupt):
        told = "interrupted"
    if told is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {told}", file=sys.stderr)
