"""What one layer computes beside its matrix products, as fast as the device allows.

On the CPU, kernels of our own, built at first use (``cpu.cpp``); on a GPU, those in Triton, where
launches or packed rows are the cost (``gpu``). Twins in plain torch do the rest, and everything
where there is no compiler or no Triton.
They stand on the ground floor because a profile must hold the rates of what will run.
"""

from __future__ import annotations

import ctypes
from types import ModuleType

import torch

from profiles.kernels import twins
from profiles.kernels.build import end_idle_threads, load_library
from profiles.kernels.call import call_kernel, gpu_kernels, is_native, pointer
from profiles.kernels.groups import pack_rows, unpack_rows
from profiles.kernels.products import grouped_linear, groups_packed, linear, multiply_rows
from profiles.packing import Packing

__all__ = [
    "decode_attention",
    "end_idle_threads",
    "grouped_linear",
    "groups_packed",
    "is_native",
    "linear",
    "load_library",
    "multiply_rows",
    "pack_rows",
    "rms_norm",
    "rotate",
    "swiglu",
    "unpack_rows",
    "without_cudnn_attention",
]

_long = ctypes.c_long


class _Attention(ctypes.Structure):
    """The arguments of attention, as ``cpu.cpp`` lays them out."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("sequence_stride", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("group", ctypes.c_long),
        ("dim", ctypes.c_long),
        ("context", ctypes.c_void_p),
        ("token_stride", ctypes.c_long),
        ("value_stride", ctypes.c_long),
        ("row_stride", ctypes.c_long),
        ("tokens", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("first_row", ctypes.c_long),
        ("lengths", ctypes.c_void_p),
        ("prompt_len", ctypes.c_long),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("group_size", ctypes.c_long),
        ("bits", ctypes.c_int),
        ("sparsity", ctypes.c_double),
        ("value_sums", ctypes.c_void_p),
        ("begins", ctypes.c_int),
    )


def without_cudnn_attention() -> None:
    """Keep torch from attending with cuDNN, which prepares itself again, for some 30 ms, whenever
    the context has grown by a token. For the whole process, as torch has it."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def decode_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int = 0,
    lengths: torch.Tensor | None = None,
    prompt_len: int = 0,
    packing: Packing | None = None,
    sparsity: float = 1.0,
    value_sums: torch.Tensor | None = None,
    begins: bool = False,
) -> None:
    """Attend with one token per sequence to some rows of the cache.

    A row is one key head of one sequence; the query heads that share it are its group.

    Parameters
    ----------
    q
        [batch, heads, head_dim], dense but for the stride of the batch.
    context
        The cache so far, [tokens, 2, rows, head_dim]: keys, then values; dense in its last
        dimension. Read fastest where the tokens of a row lie side by side.
    out
        [rows, group, head_dim], dense; is filled.
    first_row
        Where the context's rows begin among the ``batch * kv heads`` rows of ``q``.
    lengths
        Tokens of each prompt, int32 [batch] on the device. Slots from a prompt's length up to
        ``prompt_len`` are not looked at. ``None``: all are.
    packing
        Of the rows of a packed context, uint8 [tokens, 2, rows, row_bytes]. It is attended as if
        it had been unpacked to the dtype of ``q``.
    sparsity
        Each query attends to this fraction of the slots that it sees, rounded up: those with the
        largest scores (and any whose score equals the least of these). They keep the shares that
        they have among all; what the others had goes to the mean of all values seen (Ribar et al.
        2024, SparQ Attention).
    value_sums
        With ``sparsity`` below one, where the caller keeps the sums of the values seen from step
        to step, float32 [rows, head_dim]: the newest is added. Without, all values are read.
    begins
        The first step: what is in ``value_sums`` is ignored, and all values are summed.
    """
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous()
    assert context.stride(3) == 1
    assert context.dtype == (torch.uint8 if packing else q.dtype)
    assert lengths is None or (lengths.dtype == torch.int32 and lengths.is_contiguous())
    gpu = gpu_kernels() if q.is_cuda and packing and sparsity == 1 else None
    if gpu is not None and gpu.attends_packed(packing):
        gpu.decode_attention(
            q,
            context,
            out,
            first_row=first_row,
            lengths=lengths,
            prompt_len=prompt_len,
            packing=packing,
        )
        return
    if not is_native(q):
        twins.decode_attention(
            q,
            context,
            out,
            first_row=first_row,
            lengths=lengths,
            prompt_len=prompt_len,
            packing=packing,
            sparsity=sparsity,
        )
        return
    if value_sums is not None:
        assert value_sums.shape == (context.shape[2], head_dim)
        assert value_sums.dtype == torch.float32 and value_sums.is_contiguous()
    arguments = _Attention(
        q=q.data_ptr(),
        sequence_stride=q.stride(0),
        kv_heads=q.shape[1] // out.shape[1],
        group=out.shape[1],
        dim=head_dim,
        context=context.data_ptr(),
        token_stride=context.stride(0),
        value_stride=context.stride(1),
        row_stride=context.stride(2),
        tokens=context.shape[0],
        rows=context.shape[2],
        first_row=first_row,
        lengths=None if lengths is None else lengths.data_ptr(),
        prompt_len=prompt_len,
        scale=head_dim**-0.5,
        out=out.data_ptr(),
        group_size=packing.group_size if packing else 1,
        bits=packing.bits if packing else 0,
        sparsity=sparsity,
        value_sums=None if value_sums is None else value_sums.data_ptr(),
        begins=begins,
    )
    call_kernel("decode_attention", q.dtype, ctypes.byref(arguments))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Divide ``x`` by its root mean square in float32, round, and scale by ``weight``.

    ``x`` and ``out`` are [rows, heads, dim], dense in their last dimension; they may be one.
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


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Rotate [tokens, heads, head_dim] in place; the pairs are (i, i + head_dim / 2).

    ``cosines`` and ``sines`` are [positions, head_dim / 2], dense, in the dtype of ``heads``, whose
    tokens alone may have a stride. The tokens are a multiple of the positions, which they take in
    turn: those of every sequence, or each its own.
    """
    tokens, num_heads, head_dim = heads.shape
    assert heads.stride()[1:] == (head_dim, 1) and tokens % len(cosines) == 0
    if not is_native(heads):
        _fused_or_twins(heads).rotate(heads, cosines, sines)
        return
    call_kernel(
        "rotate",
        heads.dtype,
        pointer(heads),
        _long(tokens),
        _long(heads.stride(0)),
        _long(num_heads),
        _long(head_dim),
        pointer(cosines),
        pointer(sines),
        _long(len(cosines)),
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


def _fused_or_twins(tensor: torch.Tensor) -> ModuleType:
    """Return the kernels that take a tensor which the native ones do not."""
    return (gpu_kernels() if tensor.is_cuda else None) or twins
