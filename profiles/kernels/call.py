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

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def is_native(tensor: torch.Tensor) -> bool:
    """Whether the kernels for this tensor's device are our own."""
    return tensor.device.type == "cpu" and load_library() is not None


@cache
def gpu_kernels() -> ModuleType | None:
    """Return the kernels in Triton, or ``None``, with a warning, where it is not installed."""
    try:
        return importlib.import_module("profiles.kernels.gpu")
    except ImportError as error:
        logger.warning("no Triton, the GPU will be slower: %s", error)
        return None


def call_kernel(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Call a kernel for a dtype, with torch's number of threads."""
    library = load_library()
    assert library is not None
    function = getattr(library, f"{name}_{_NAMES[dtype]}")
    function.restype = None
    # ctypes lets go of Python's lock, so that other channels' threads go on.
    function(*arguments, ctypes.c_int(torch.get_num_threads()))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return where a tensor's elements begin."""
    return ctypes.c_void_p(tensor.data_ptr())
