"""Calls of the native kernels."""

from __future__ import annotations

import ctypes
import importlib
import logging
from functools import cache
from types import ModuleType

import torch

from profiles.kernels.build import load_library

logger = logging.getLogger(__name__)

# Ampere.
LEAST_CAPABILITY = (8, 0)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def is_native(tensor: torch.Tensor) -> bool:
    """Whether the kernels for this tensor's device are our own."""
    return tensor.device.type == "cpu" and load_library() is not None


@cache
def gpu_kernels() -> ModuleType | None:
    """Return the kernels in Triton; ``None``, with a warning, where they cannot run.

    Triton may be missing, or its compiler, or it may not support the GPU.
    """
    try:
        if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
            raise RuntimeError("it converts to bfloat16 on newer GPUs only")
        kernels = importlib.import_module("profiles.kernels.gpu")
        row = torch.ones(1, 1, 16, dtype=torch.bfloat16, device="cuda")
        kernels.rms_norm(row, row[0, 0], 1.0, torch.empty_like(row))
    # The compilers raise many kinds of errors; the twins replace the kernels.
    except Exception as error:
        logger.warning("no Triton, the GPU will be slower: %s", error)
        return None
    return kernels


def call_kernel(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Call a kernel for a dtype, with torch's number of threads."""
    library = load_library()
    assert library is not None
    function = getattr(library, f"{name}_{_NAMES[dtype]}")
    function.restype = None
    # ctypes releases the interpreter's lock, so that other channels' threads continue.
    function(*arguments, ctypes.c_int(torch.get_num_threads()))


def has_integer_products() -> bool:
    """Whether the native kernels multiply codes of 4-bit weights as integers on this processor."""
    library = load_library()
    return library is not None and bool(library.multiplies_codes())


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return the address of a tensor's first element."""
    return ctypes.c_void_p(tensor.data_ptr())
