"""Matrix products of few rows: plain or packed matrices, one or a group of them.

On the CPU, free cores take the tiles of a product one by one. torch gives each thread an equal
share and waits for the slowest, which beside another program is a preempted thread. torch is also
slower with few rows, and with 16-bit floats on processors that cannot multiply them. On a GPU, a
group of products is one launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F

from profiles.kernels import twins
from profiles.kernels.call import (
    call_kernel,
    gpu_kernels,
    has_integer_products,
    is_native,
)
from profiles.kernels.row_tiles import multiply_packed_tiles, multiply_tiles, rows_are_fixed
from profiles.mounts import read_lines
from profiles.packing import CODED_GROUP_SIZE, DIRECT_ROWS, Packing

# With more rows torch is faster where the processor has matrix instructions for bfloat16: Intel's
# AMX, Arm's BF16.
MOST_ROWS = 16
MATRIX_UNITS = frozenset({"amx_bf16", "bf16"})
# With more rows a group on average, a GPU multiplies one group at a time: each is longer than a
# launch.
MOST_GROUP_ROWS = 512


class Products(ctypes.Structure):
    """The arguments of a product, as ``product_weights.h`` lays them out."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_long),
        ("weights", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("groups", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("dim", ctypes.c_long),
        ("weight_stride", ctypes.c_long),
        ("group_size", ctypes.c_long),
        ("bits", ctypes.c_int),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_long),
        ("adds", ctypes.c_int),
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    adds: bool = False,
) -> torch.Tensor:
    """Multiply ``x`` [rows, in] by ``weight`` [out, in], add ``bias`` [out]: [rows, out].

    Sums are float32, rounded once. ``out`` may have a stride between its rows. With ``adds`` the
    rounded product is added to the values in ``out``.
    """
    if multiplies_tiles(x):
        return multiply_tiles(x, weight, bias, out, adds=adds)
    if not is_native(x) or len(x) > most_native_rows(x.dtype):
        return _whole(x, weight, bias, out, adds)
    if out is None:
        out = x.new_empty(len(x), len(weight))
    _multiply(x, [len(x)], [weight], None, out, biases=_one(bias), adds=adds)
    return out


def multiply_rows(
    x: torch.Tensor,
    packed: torch.Tensor,
    packing: Packing,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    adds: bool = False,
) -> None:
    """Multiply ``x`` [rows, num_elements] by a packed matrix into ``out`` [rows, outputs].

    The result is that of the matrix unpacked to the dtype of ``x``. Where ``rounds_inputs``, inputs
    are rounded to 8 bits first. All tensors are dense in their last dimension.

    Parameters
    ----------
    packed
        uint8 [outputs, row_bytes].
    bias
        [outputs]; added before rounding.
    adds
        Whether the rounded product is added to the values in ``out``.
    """
    assert out.shape == (len(x), len(packed)) and out.stride(1) == packed.stride(1) == 1
    if multiplies_tiles(x):
        multiply_packed_tiles(x, packed, packing, bias, out, adds=adds)
    elif is_native(x):
        _multiply(x, [len(x)], [packed], packing, out, biases=_one(bias), adds=adds)
    elif fused := _fused(x):
        fused.multiply_rows(x, packed, packing, out, bias, adds=adds)
    else:
        _whole(x, twins.unpacked(packed, packing, x.dtype), bias, out, adds)


def grouped_linear(
    x: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    out: torch.Tensor | None = None,
    *,
    packing: Packing | None = None,
    biases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Multiply each group of rows by its own matrix, in one call: [rows, outputs].

    Parameters
    ----------
    x
        [rows, in]; groups are adjacent and in order.
    counts
        Rows of each group; a group may be empty.
    weights
        The matrix of each group: [outputs, in] in the dtype of ``x``, or uint8 [outputs, row_bytes]
        with ``packing``. All have the same shape and strides.
    out
        The result; it may have a stride between its rows.
    biases
        The bias of each group, [outputs] in the dtype of ``x``.
    """
    assert len(counts) == len(weights) > 0 and sum(counts) == len(x)
    assert len({(weight.shape, weight.stride()) for weight in weights}) == 1
    if out is None:
        out = x.new_empty(len(x), len(weights[0]))
    if multiplies_tiles(x):
        _group_by_group(x, counts, weights, out, packing, biases)
    elif is_native(x):
        _multiply(x, counts, weights, packing, out, biases=biases)
    else:
        fused = _fused(x) if len(x) <= MOST_GROUP_ROWS * len(counts) else None
        (fused or twins).grouped_linear(x, counts, weights, packing, out)
        for rows, bias in zip(out.split(list(counts)), biases or (), strict=bool(biases)):
            rows.add_(bias)
    return out


def groups_packed(x: torch.Tensor, num_groups: int) -> bool:
    """Whether the rows of ``x`` in ``num_groups`` groups are multiplied by packed weights directly,
    without unpacking each group's matrix first.

    A CPU multiplies the codes, or unpacks a tile of weights for all rows of a group, unless torch
    multiplies many rows faster.
    """
    if is_native(x):
        return most_native_rows(x.dtype) == torch.inf
    return len(x) <= DIRECT_ROWS * num_groups and _fused(x) is not None


def has_packed_products(x: torch.Tensor) -> bool:
    """Whether a kernel on the device of ``x`` multiplies few rows by packed weights directly."""
    return is_native(x) or _fused(x) is not None


def rounds_inputs(dtype: torch.dtype, group_size: int = CODED_GROUP_SIZE) -> bool:
    """Whether the CPU multiplies the codes of 4-bit weights in such groups as integers.

    As many inputs then become integers from -127 to 127, with a float32 scale.
    """
    fits = dtype is torch.bfloat16 and group_size == CODED_GROUP_SIZE
    return fits and has_integer_products()


def multiplies_codes(dtype: torch.dtype, group_size: int = CODED_GROUP_SIZE) -> bool:
    """Whether that is the fastest for any number of rows, so that no weights are unpacked."""
    return rounds_inputs(dtype, group_size) and most_native_rows(dtype) == torch.inf


def most_native_rows(dtype: torch.dtype) -> float:
    """Return the most rows with which our own product is the fastest on this processor."""
    has_unit = dtype is torch.bfloat16 and _features() & MATRIX_UNITS
    return MOST_ROWS if has_unit else torch.inf


def multiplies_tiles(x: torch.Tensor) -> bool:
    """Whether torch multiplies any number of the rows ``x``, in tiles (see ``fixed_rows``)."""
    is_torchs = not is_native(x) or most_native_rows(x.dtype) < torch.inf
    return rows_are_fixed() and x.device.type == "cpu" and is_torchs


def _group_by_group(
    x: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    out: torch.Tensor,
    packing: Packing | None,
    biases: Sequence[torch.Tensor] | None,
) -> None:
    parts = zip(x.split(list(counts)), weights, out.split(list(counts)), strict=True)
    for group, (rows, weight, to) in enumerate(parts):
        bias = biases[group] if biases else None
        if not len(rows):
            continue
        if packing:
            multiply_rows(rows, weight, packing, to, bias)
        else:
            linear(rows, weight, bias, to)


@cache
def _features() -> frozenset[str]:
    """Return the features of this processor, by the names of /proc/cpuinfo."""
    found = read_lines(Path("/proc/cpuinfo"))
    lines = [line for line in found if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].split()) if lines else frozenset()


def _multiply(
    x: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    packing: Packing | None,
    out: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor] | None = None,
    adds: bool = False,
) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    first = weights[0]
    width = packing.num_elements if packing else first.shape[1]
    assert first.dtype == (torch.uint8 if packing else x.dtype) and first.stride(1) == 1
    assert x.shape[1] == width and out.shape == (len(x), len(first)) and out.stride(1) == 1
    assert out.dtype == x.dtype
    assert all(bias.dtype == x.dtype and bias.stride(0) == 1 for bias in biases or ())
    # Named, because they must outlive the call.
    starts = (ctypes.c_long * (len(counts) + 1))(0, *accumulate(counts))
    matrices = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
    added = biases and (ctypes.c_void_p * len(biases))(*(bias.data_ptr() for bias in biases))
    arguments = Products(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weights=ctypes.addressof(matrices),
        biases=ctypes.addressof(added) if added else None,
        starts=ctypes.addressof(starts),
        groups=len(counts),
        outputs=len(first),
        dim=width,
        weight_stride=first.stride(0) * first.element_size(),
        group_size=packing.group_size if packing else 1,
        bits=packing.bits if packing else 0,
        out=out.data_ptr(),
        out_stride=out.stride(0),
        adds=adds,
    )
    call_kernel("multiply", x.dtype, ctypes.byref(arguments))


def _fused(tensor: torch.Tensor) -> ModuleType | None:
    """Return the kernels for a tensor on a GPU, where there are any."""
    return gpu_kernels() if tensor.is_cuda else None


def _one(bias: torch.Tensor | None) -> list[torch.Tensor] | None:
    return None if bias is None else [bias]


def _whole(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    adds: bool,
) -> torch.Tensor:
    """Multiply with torch's own product."""
    if out is None:
        return F.linear(x, weight, bias)
    if adds:
        return out.add_(F.linear(x, weight, bias))
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
