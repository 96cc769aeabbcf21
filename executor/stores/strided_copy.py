"""Strided copies between CPU and GPU memory.

CUDA copies at the rate of the link. torch would first make a contiguous copy, and wait for it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from profiles.errors import RunError

# CUmemorytype, of the CUDA driver API.
_HOST, _DEVICE = 1, 2


class _Place(ctypes.Structure):
    """The address of one side of a copy: half of the driver API's CUDA_MEMCPY2D."""

    _fields_ = (
        ("x_bytes", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("memory_type", ctypes.c_uint),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("array", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
    )


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("source", _Place),
        ("target", _Place),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


def copy_runs(target: torch.Tensor, source: torch.Tensor) -> int:
    """Copy [runs, elements] to the same shape, each dense in its last dimension.

    On CUDA the copy is queued on the current stream, and CPU memory must be pinned. Returns the
    copied bytes.

    Raises
    ------
    RunError
        When CUDA refuses the copy.
    """
    assert target.shape == source.shape and target.stride(1) == source.stride(1) == 1
    num_bytes = source.numel() * source.element_size()
    if target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=True)
    elif target.is_cuda or source.is_cuda:
        _queue(target, source)
    else:
        target.copy_(source)
    return num_bytes


def _queue(target: torch.Tensor, source: torch.Tensor) -> None:
    copy = _Copy(
        source=_place(source),
        target=_place(target),
        width_bytes=source.shape[1] * source.element_size(),
        height=source.shape[0],
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = _driver().cuMemcpy2DAsync_v2(ctypes.byref(copy), stream)
    if status != 0:
        raise RunError(f"CUDA refused a copy of {source.shape[0]} runs (status {status})")


def _place(runs: torch.Tensor) -> _Place:
    place = _Place(pitch=runs.stride(0) * runs.element_size())
    if runs.is_cuda:
        place.memory_type, place.device = _DEVICE, runs.data_ptr()
    else:
        place.memory_type, place.host = _HOST, runs.data_ptr()
    return place


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
