"""Attention of one token for each sequence to the KV cache, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from profiles.kernels import twins
from profiles.kernels.call import call_kernel, gpu_kernels, is_native
from profiles.packing import Packing

# With fewer, a row is read or unpacked too often.
QUERIES_AT_ONCE = 16


class Arguments(ctypes.Structure):
    """The arguments of the native kernel, in the order of ``cache.h``."""

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
        ("void_slots", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("group_size", ctypes.c_long),
        ("bits", ctypes.c_int),
        ("sparsity", ctypes.c_double),
        ("value_sums", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
        ("value_dim", ctypes.c_long),
        ("head_splits", ctypes.c_long),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_long),
        ("page_tokens", ctypes.c_long),
        ("page_stride", ctypes.c_long),
        ("lengths", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("sums_at", ctypes.c_void_p),
        ("carry", ctypes.c_void_p),
        ("keeps_carry", ctypes.c_int),
    )


def without_cudnn_attention() -> None:
    """Turn torch's attention with cuDNN off, for the whole process.

    cuDNN takes some 30 ms to prepare for each new length of the context.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def decode_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int = 0,
    void_slots: torch.Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
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
        dimension. Reading is fastest where the tokens of a row are adjacent. Of latent attention
        it is [tokens, 1, rows, head_dim]: the first elements of a key are its value.
    out
        The result, [rows, group, value_dim], dense; ``value_dim`` is ``head_dim``, or less where
        values are parts of keys.
    first_row
        The first of the context's rows among the ``batch * kv heads`` rows of ``q``.
    void_slots
        Slots without a token of each sequence, int32 [batch, 2] on the device, dense: the first,
        and one past the last. They are masked. A first one behind the last wraps around: all slots
        are void but those from the last to the first. ``None`` masks no slot.
    scale
        Factor of the scores; ``None`` stands for ``head_dim ** -0.5``.
    soft_cap
        ``c`` in ``c tanh(scores / c)``, after the scale; ``None`` leaves the scores.
    sinks
        A further score of each query head, float32 [heads] on the device, dense. It takes part in
        the softmax and has no value. ``None`` is no such score.
    slopes
        Of ALiBi, float32 [heads] on the device, dense: what a query head's scores lose, after the
        soft cap, for each visible slot between the key and the last slot. ``None`` is no ALiBi.
    packing
        The packing of a packed context, uint8 [tokens, 2, rows, row_bytes]. The result is that of
        the context unpacked to the dtype of ``q``.
    sparsity
        The fraction of the visible slots that each query attends to, rounded up: the slots with the
        largest scores, ties included. These keep their shares of the dense softmax. The shares of
        all others go to the mean of all visible values (SparQ Attention, Ribar et al. 2024).
    value_sums
        For ``sparsity`` below one: the sums of the visible values, float32 [rows, head_dim], kept
        by the caller from step to step. The new value is added. Without them, all values are read.
    begins
        Whether this is the first step, which sums all values into ``value_sums`` anew.
    """
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous()
    assert context.stride(3) == 1 and out.shape[2] <= head_dim
    assert context.dtype == (torch.uint8 if packing else q.dtype)
    if void_slots is not None:
        assert void_slots.dtype == torch.int32 and void_slots.is_contiguous()
    if sinks is not None:
        assert sinks.dtype == torch.float32 and sinks.shape == (q.shape[1],)
    if slopes is not None:
        assert slopes.dtype == torch.float32 and slopes.shape == (q.shape[1],)
    rows: dict[str, Any] = {
        "first_row": first_row,
        "void_slots": void_slots,
        "scale": head_dim**-0.5 if scale is None else scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "slopes": slopes,
    }
    is_latent = context.shape[1] == 1
    gpu = gpu_kernels() if q.is_cuda and packing and sparsity == 1 and not is_latent else None
    if gpu is not None and gpu.attends_packed(packing):
        gpu.decode_attention(q, context, out, packing=packing, **rows)
    elif is_native(q):
        _attend_natively(
            q,
            context,
            out,
            packing=packing,
            sparsity=sparsity,
            value_sums=value_sums,
            begins=begins,
            **rows,
        )
    else:
        twins.decode_attention(q, context, out, packing=packing, sparsity=sparsity, **rows)


def address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's first element, null for none."""
    return None if tensor is None else tensor.data_ptr()


def head_splits_of(group: int) -> int:
    """Return the number of equal parts of a group of query heads that attend one by one.

    The sums of all heads that share a row of latent attention do not fit in a core's cache, and a
    single row would keep one core busy.
    """
    sizes = (size for size in range(QUERIES_AT_ONCE, group) if group % size == 0)
    return group // next(sizes, group)


def _attend_natively(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int,
    void_slots: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    packing: Packing | None,
    sparsity: float,
    value_sums: torch.Tensor | None,
    begins: bool,
) -> None:
    """See ``decode_attention``, with the native kernel on the CPU."""
    head_dim = q.shape[2]
    if value_sums is not None:
        assert value_sums.shape == (context.shape[2], head_dim)
        assert value_sums.dtype == torch.float32 and value_sums.is_contiguous()
    first_step = None if value_sums is None or not begins else torch.ones(len(q)).byte()
    is_latent = context.shape[1] == 1
    head_splits = head_splits_of(out.shape[1]) if is_latent and value_sums is None else 1
    arguments = Arguments(
        q=q.data_ptr(),
        sequence_stride=q.stride(0),
        kv_heads=q.shape[1] // out.shape[1] * head_splits,
        group=out.shape[1] // head_splits,
        dim=head_dim,
        context=context.data_ptr(),
        token_stride=context.stride(0),
        value_stride=context.stride(1) if context.shape[1] == 2 else 0,
        row_stride=context.stride(2),
        tokens=context.shape[0],
        rows=context.shape[2] * head_splits,
        first_row=first_row * head_splits,
        void_slots=address(void_slots),
        scale=scale,
        soft_cap=soft_cap or 0.0,
        sinks=address(sinks),
        slopes=address(slopes),
        out=out.data_ptr(),
        group_size=packing.group_size if packing else 1,
        bits=packing.bits if packing else 0,
        sparsity=sparsity,
        value_sums=address(value_sums),
        begins=address(first_step),
        value_dim=out.shape[2],
        head_splits=head_splits,
    )
    call_kernel("decode_attention", q.dtype, ctypes.byref(arguments))
