"""The outputs of experts, added to the rows of their tokens."""

from __future__ import annotations

import ctypes

import torch

from profiles.kernels.call import call_kernel, is_native

# Rows are converted in parts of so many, where their factors have another dtype.
WEIGHED_AT_ONCE = 256


class _RoutedRows(ctypes.Structure):
    """The arguments, as ``routed_rows.h`` lays them out."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("row_stride", ctypes.c_long),
        ("count", ctypes.c_long),
        ("dim", ctypes.c_long),
        ("tokens", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_long),
        ("num_tokens", ctypes.c_long),
    )


def add_routed_rows(
    out: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor | None
) -> None:
    """Add each row, times its factor, to the row of its token, in the order of the rows.

    The native kernel rounds each product to the dtype of ``out``, and each sum. So a token's sum
    does not depend on how its rows are cut into calls. torch may sum the rows of a call in float32.

    Parameters
    ----------
    out
        [tokens, dim], dense in its last dimension.
    tokens
        The token of each row, int64 [rows].
    rows
        [rows, dim] in the dtype of ``out``; the twin overwrites it with the products.
    factors
        [rows, 1] in the dtype of ``out`` or float32; ``None`` where rows are added as they are.
    """
    assert rows.shape == (len(tokens), out.shape[1]) and rows.dtype == out.dtype
    if not is_native(out):
        _add_with_torch(out, tokens, rows, factors)
        return
    assert out.stride(1) == rows.stride(1) == 1 and tokens.dtype == torch.int64
    # Named, because they must outlive the call.
    tokens, wide = tokens.contiguous(), None if factors is None else factors.float().contiguous()
    arguments = _RoutedRows(
        rows=rows.data_ptr(),
        row_stride=rows.stride(0),
        count=len(rows),
        dim=rows.shape[1],
        tokens=tokens.data_ptr(),
        factors=None if wide is None else wide.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        num_tokens=len(out),
    )
    call_kernel("add_routed", out.dtype, ctypes.byref(arguments))


def weigh_rows(rows: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply rows [rows, dim] by their factors [rows, 1] in place, with one rounding.

    Temporaries: where dtypes differ, two float32 copies of ``WEIGHED_AT_ONCE`` rows.
    """
    step = len(rows) if rows.dtype == factors.dtype else WEIGHED_AT_ONCE
    for first in range(0, len(rows), step):
        rows[first : first + step].mul_(factors[first : first + step])


def _add_with_torch(
    out: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor | None
) -> None:
    if factors is not None:
        weigh_rows(rows, factors)
    if out.is_cuda:
        # The faster ``index_add_`` has no fixed order on a GPU.
        out.index_put_((tokens,), rows, accumulate=True)
    else:
        out.index_add_(0, tokens, rows)
