"""Keeps glibc from returning the memory of temporaries to the system after every operation."""

from __future__ import annotations

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)

# From malloc.h; stable parts of glibc's interface.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_INT_MAX = 2**31 - 1
# What glibc begins with.
_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_BYTES = 65536, 128 * 1024


def keep_freed_memory() -> None:
    """Serve all temporaries from one heap that only grows.

    By default a temporary of some MiB is mapped and unmapped each time, and touching its fresh
    pages costs several times the arithmetic on it. All threads share the heap, so that its peak
    is that of the whole process and not the sum of what each thread once needed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        logger.info("no mallopt in this C library; temporaries are mapped afresh each time")
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def end_keeping() -> None:
    """Give back what a run has left free, and let temporaries be mapped as before it.

    For programs that go on after a run: whatever they allocate and free next is theirs to keep or
    to return.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_BYTES)
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Give the system back what the heap holds between blocks in use.

    Temporaries of many sizes leave gaps, of which there may be more than of what is used.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
