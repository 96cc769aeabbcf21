"""Rows into groups of 4 or 8 bits and back (see ``profiles.packing`` for the layout)."""

from __future__ import annotations

import ctypes

import torch

from profiles.kernels.call import call_kernel, gpu_kernels, is_native, pointer
from profiles.kernels.group_twins import pack_rows_twin, unpack_rows_twin
from profiles.packing import Packing

_long = ctypes.c_long


def pack_rows(x: torch.Tensor, packing: Packing, out: torch.Tensor) -> bool:
    """Pack the rows of ``x`` into ``out``.

    Parameters
    ----------
    x
        [outer, inner, num_elements], dense in its last dimension; float32, bfloat16 or float16.
    out
        uint8 [outer, inner, row_bytes], dense in its last dimension.

    Returns
    -------
    bool
        Whether every value is finite; otherwise the packed rows have no meaning. On a GPU it is
        always true, because a check would wait for the GPU.
    """
    assert x.shape[2] == packing.num_elements and out.shape == (*x.shape[:2], packing.row_bytes)
    assert x.stride(2) == out.stride(2) == 1 and out.dtype == torch.uint8
    if x.is_cuda:
        kernels = gpu_kernels()
        (kernels.pack_rows if kernels else pack_rows_twin)(x, packing, out)
        return True
    if not is_native(x):
        pack_rows_twin(x, packing, out)
        return bool(x.isfinite().all())
    bad = ctypes.c_long(0)
    call_kernel(
        "pack_rows",
        x.dtype,
        pointer(x),
        *_rows(x),
        *_shape(packing),
        pointer(out),
        _long(out.stride(0)),
        _long(out.stride(1)),
        ctypes.byref(bad),
    )
    return bad.value == 0


def unpack_rows(packed: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    """Unpack uint8 [outer, inner, row_bytes] into ``out`` [outer, inner, num_elements].

    Elements are computed in float32 and rounded once to the dtype of ``out``. Both tensors are
    dense in their last dimension.
    """
    assert out.shape == (*packed.shape[:2], packing.num_elements)
    assert packed.shape[2] == packing.row_bytes and packed.stride(2) == out.stride(2) == 1
    if out.is_cuda:
        kernels = gpu_kernels()
        (kernels.unpack_rows if kernels else unpack_rows_twin)(packed, packing, out)
    elif is_native(out):
        call_kernel(
            "unpack_rows",
            out.dtype,
            pointer(packed),
            *_rows(packed),
            *_shape(packing),
            pointer(out),
            _long(out.stride(0)),
            _long(out.stride(1)),
        )
    else:
        unpack_rows_twin(packed, packing, out)


def _rows(x: torch.Tensor) -> tuple[ctypes.c_long, ...]:
    return _long(x.shape[0]), _long(x.shape[1]), _long(x.stride(0)), _long(x.stride(1))


def _shape(packing: Packing) -> tuple[object, ...]:
    return (_long(packing.num_elements), _long(packing.group_size), ctypes.c_int(packing.bits))
