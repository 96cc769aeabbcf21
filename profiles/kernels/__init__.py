"""What one layer computes beside its matrix products, as fast as the device allows.

On the CPU, kernels of our own, built at first use (``cpu.cpp``); on a GPU and where there is no
compiler, their twins in plain torch. They stand on the ground floor because a profile must hold
the rates of what will run.
"""

from __future__ import annotations

import ctypes

import torch

from profiles.kernels import twins
from profiles.kernels.build import load_library

__all__ = [
    "decode_attention", "is_native", "load_library", "rms_norm", "rotate", "swiglu",
    "without_cudnn_attention",
]  # fmt: skip

_long = ctypes.c_long
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


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
    )


def without_cudnn_attention() -> None:
    """Keep torch from attending with cuDNN, which prepares itself again, for some 30 ms, whenever
    the context has grown by a token. For the whole process, as torch has it."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def is_native(tensor: torch.Tensor) -> bool:
    """Whether the kernels for this tensor's device are our own."""
    return tensor.device.type == "cpu" and load_library() is not None


def decode_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int = 0,
    lengths: torch.Tensor | None = None,
    prompt_len: int = 0,
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
    """
    if not is_native(q):
        twins.decode_attention(
            q, context, out, first_row=first_row, lengths=lengths, prompt_len=prompt_len
        )
        return
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous()
    assert context.stride(3) == 1
    assert lengths is None or (lengths.dtype == torch.int32 and lengths.is_contiguous())
    arguments = _Attention(
        q=q.data_ptr(), sequence_stride=q.stride(0), kv_heads=q.shape[1] // out.shape[1],
        group=out.shape[1], dim=head_dim, context=context.data_ptr(),
        token_stride=context.stride(0), value_stride=context.stride(1),
        row_stride=context.stride(2), tokens=context.shape[0], rows=context.shape[2],
        first_row=first_row, lengths=None if lengths is None else lengths.data_ptr(),
        prompt_len=prompt_len, scale=head_dim**-0.5, out=out.data_ptr(),
    )  # fmt: skip
    _call("decode_attention", q, ctypes.byref(arguments))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Divide ``x`` by its root mean square in float32, round, and scale by ``weight``.

    ``x`` and ``out`` are [rows, heads, dim], dense in their last dimension; they may be one.
    """
    if not is_native(x):
        twins.rms_norm(x, weight, eps, out)
        return
    assert x.stride(2) == out.stride(2) == 1
    _call(
        "rms_norm", x, _pointer(x), _long(x.shape[0]), _long(x.stride(0)), _long(x.shape[1]),
        _long(x.stride(1)), _long(x.shape[2]), _pointer(weight), ctypes.c_float(eps),
        _pointer(out), _long(out.stride(0)), _long(out.stride(1)),
    )  # fmt: skip


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Rotate [tokens, heads, head_dim] in place; the pairs are (i, i + head_dim / 2).

    ``cosines`` and ``sines`` are [tokens, head_dim / 2], dense, in the dtype of ``heads``, whose
    tokens alone may have a stride.
    """
    if not is_native(heads):
        twins.rotate(heads, cosines, sines)
        return
    tokens, num_heads, head_dim = heads.shape
    assert heads.stride()[1:] == (head_dim, 1)
    _call(
        "rotate", heads, _pointer(heads), _long(tokens), _long(heads.stride(0)),
        _long(num_heads), _long(head_dim), _pointer(cosines), _pointer(sines),
    )  # fmt: skip


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Replace ``gate`` [rows, ffn] by ``silu(gate) * up``, rounded after each; both dense in
    their last dimension."""
    if not is_native(gate):
        twins.swiglu(gate, up)
        return
    assert gate.stride(1) == up.stride(1) == 1
    _call(
        "swiglu", gate, _pointer(gate), _pointer(up), _long(gate.shape[0]), _long(gate.shape[1]),
        _long(gate.stride(0)), _long(up.stride(0)),
    )  # fmt: skip


def _call(name: str, tensor: torch.Tensor, *arguments: object) -> None:
    library = load_library()
    assert library is not None
    function = getattr(library, f"{name}_{_NAMES[tensor.dtype]}")
    function.restype = None
    # ctypes lets go of Python's lock, so that other channels' threads go on.
    function(*arguments, ctypes.c_int(torch.get_num_threads()))


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
