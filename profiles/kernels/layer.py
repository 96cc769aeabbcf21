"""Norm, rotation and gate of one layer, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
from types import ModuleType

import torch

from profiles.kernels import twins
from profiles.kernels.call import call_kernel, gpu_kernels, is_native, pointer

_long = ctypes.c_long


# In the order of ``Activation`` in ``cpu.cpp``.
ACTIVATIONS = ("sigmoid", "silu", "gelu", "gelu_tanh")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Divide ``x`` by its root mean square in float32, round, and scale by ``weight``.

    ``x`` and ``out`` are [rows, heads, dim], dense in their last dimension; they may be the same.
    """
    if not is_native(x):
        _fused_or_twins(x).rms_norm(x, weight, eps, out)
        return
    assert x.stride(2) == out.stride(2) == 1
    call_kernel(
        "rms_norm",
        x.dtype,
        pointer(x),
        _long(x.shape[0]),
        _long(x.stride(0)),
        _long(x.shape[1]),
        _long(x.stride(1)),
        _long(x.shape[2]),
        pointer(weight),
        ctypes.c_float(eps),
        pointer(out),
        _long(out.stride(0)),
        _long(out.stride(1)),
    )


def rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *, interleaved: bool = False
) -> None:
    """Rotate pairs of elements of [tokens, heads, head_dim] in place.

    ``cosines`` and ``sines`` are [positions, pairs], dense, in the dtype of ``heads``. Pair ``i``
    is (i, i + pairs), or ``interleaved`` (2 i, 2 i + 1); elements behind the pairs stay. Tokens and
    heads may have a stride. Token ``i`` has position ``i % positions``, and the
    number of tokens is a multiple of ``positions``.
    """
    tokens, num_heads, head_dim = heads.shape
    assert heads.stride(2) == 1 and tokens % len(cosines) == 0
    pairs = cosines.shape[1]
    assert 2 * pairs <= head_dim
    if not is_native(heads):
        _fused_or_twins(heads).rotate(heads, cosines, sines, interleaved=interleaved)
        return
    call_kernel(
        "rotate",
        heads.dtype,
        pointer(heads),
        _long(tokens),
        _long(heads.stride(0)),
        _long(num_heads),
        _long(heads.stride(1)),
        pointer(cosines),
        pointer(sines),
        _long(len(cosines)),
        _long(pairs),
        _long(interleaved),
    )


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Replace ``gate`` [rows, ffn] by ``silu(gate) * up``, rounded after each; both dense in
    their last dimension."""
    if not is_native(gate):
        twins.swiglu(gate, up)
        return
    assert gate.stride(1) == up.stride(1) == 1
    call_kernel(
        "swiglu",
        gate.dtype,
        pointer(gate),
        pointer(up),
        _long(gate.shape[0]),
        _long(gate.shape[1]),
        _long(gate.stride(0)),
        _long(up.stride(0)),
    )


def activate(x: torch.Tensor, activation: str) -> None:
    """Replace ``x`` [rows, ffn] by one of ``ACTIVATIONS`` of it; dense in its last dimension.

    On a CPU a row has the same bits alone and among others, which torch's own do not have at every
    width: they treat the last elements of all rows together apart.
    """
    if not is_native(x):
        twins.activate(x, activation)
        return
    assert x.stride(1) == 1
    call_kernel(
        "activate",
        x.dtype,
        pointer(x),
        _long(x.shape[0]),
        _long(x.shape[1]),
        _long(x.stride(0)),
        ctypes.c_int(ACTIVATIONS.index(activation)),
    )


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, *, limit: float, alpha: float) -> None:
    """Replace ``gate`` [rows, ffn] by ``(up + 1) * gate * sigmoid(alpha * gate)``, rounded
    after each step; both dense in their last dimension.

    ``gate`` is at most ``limit`` first, and ``up`` is between ``-limit`` and ``limit``. ``up`` may
    be overwritten.
    """
    if not is_native(gate):
        twins.clamped_swiglu(gate, up, limit, alpha)
        return
    assert gate.stride(1) == up.stride(1) == 1
    call_kernel(
        "clamped_swiglu",
        gate.dtype,
        pointer(gate),
        pointer(up),
        _long(gate.shape[0]),
        _long(gate.shape[1]),
        _long(gate.stride(0)),
        _long(up.stride(0)),
        ctypes.c_float(limit),
        ctypes.c_float(alpha),
    )


def _fused_or_twins(tensor: torch.Tensor) -> ModuleType:
    """Return the kernels for a tensor without native ones."""
    return (gpu_kernels() if tensor.is_cuda else None) or twins
