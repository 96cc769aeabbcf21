"""Packing and unpacking of rows in groups of 4 or 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from profiles.packing import Packing

# Elements that one program packs or unpacks: rows of a cache are far too short to fill one.
PROGRAM_ELEMENTS = 1024


def pack_rows(x: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    """See ``profiles.kernels.pack_rows``; values are not checked to be finite."""
    used_bytes = -(-packing.num_elements * packing.bits // 8)
    if used_bytes < packing.code_bytes:
        out[..., used_bytes : packing.code_bytes] = 0
    num_rows, rows = x.shape[0] * x.shape[1], PROGRAM_ELEMENTS // packing.group_size
    _pack[(triton.cdiv(num_rows, rows), packing.num_groups)](
        x,
        out,
        num_rows,
        x.shape[1],
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        DIM=packing.num_elements,
        GROUP=packing.group_size,
        BITS=packing.bits,
        CODE_BYTES=packing.code_bytes,
        ROWS=rows,
    )


def unpack_rows(packed: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    """See ``profiles.kernels.unpack_rows``."""
    block = min(PROGRAM_ELEMENTS, triton.next_power_of_2(packing.num_elements))
    num_rows, rows = packed.shape[0] * packed.shape[1], PROGRAM_ELEMENTS // block
    _unpack[(triton.cdiv(num_rows, rows), triton.cdiv(packing.num_elements, block))](
        packed,
        out,
        num_rows,
        packed.shape[1],
        packed.stride(0),
        packed.stride(1),
        out.stride(0),
        out.stride(1),
        DIM=packing.num_elements,
        GROUP=packing.group_size,
        BITS=packing.bits,
        CODE_BYTES=packing.code_bytes,
        BLOCK=block,
        ROWS=rows,
    )


@triton.jit
def _rounded_out(x):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


# Arguments that change from call to call must not trigger a new compilation.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "inner",
        "x_outer",
        "x_inner",
        "out_outer",
        "out_inner",
    ],
    do_not_specialize_on_alignment=["x", "out"],
)
def _pack(
    x,
    out,
    num_rows,
    inner,
    x_outer,
    x_inner,
    out_outer,
    out_inner,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row, outer, within = (row < num_rows)[:, None], row // inner, row % inner
    g = tl.program_id(1)
    x += (outer * x_outer + within * x_inner)[:, None] + g * GROUP
    out += (outer * out_outer + within * out_inner)[:, None]
    count = tl.minimum(GROUP, DIM - g * GROUP)
    i = tl.arange(0, GROUP)[None, :]
    # A short group repeats its first element, which does not change its range.
    values = tl.load(x + tl.where(i < count, i, 0), mask=is_row, other=0.0).to(tl.float32)
    least, most = tl.min(values, 1)[:, None], tl.max(values, 1)[:, None]
    inwards = (least.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    base = tl.where(least < 0, _rounded_out(least), inwards)
    TOP: tl.constexpr = (1 << BITS) - 1
    half = tl.where(most - base < float("inf"), 1.0, 0.5)
    step = _rounded_out((most * half - base * half) / TOP / half)
    shared = (out + CODE_BYTES + 4 * g).to(tl.pointer_type(tl.bfloat16))
    tl.store(shared, step.to(tl.bfloat16), mask=is_row)
    tl.store(shared + 1, base.to(tl.bfloat16), mask=is_row)
    divisor = tl.where(step > 0, step * half, 1.0)
    if BITS == 8:
        codes = ((values * half - base * half) / divisor + 0.5).to(tl.int32)
        codes = tl.where(step > 0, tl.minimum(codes, TOP), 0)
        tl.store(out + g * GROUP + i, codes.to(tl.uint8), mask=is_row & (i < count))
    else:
        pairs = (count + 1) // 2
        j = tl.arange(0, GROUP // 2)[None, :]
        low = tl.load(x + tl.where(j < pairs, j, 0), mask=is_row, other=0.0).to(tl.float32)
        is_high = is_row & (j + pairs < count)
        high = tl.load(x + j + pairs, mask=is_high, other=0.0).to(tl.float32)
        low_codes = ((low * half - base * half) / divisor + 0.5).to(tl.int32)
        high_codes = ((high * half - base * half) / divisor + 0.5).to(tl.int32)
        low_codes = tl.where(step > 0, tl.minimum(low_codes, TOP), 0)
        high_codes = tl.where(is_high & (step > 0), tl.minimum(high_codes, TOP), 0)
        codes = (low_codes | (high_codes << 4)).to(tl.uint8)
        tl.store(out + g * (GROUP // 2) + j, codes, mask=is_row & (j < pairs))


@triton.jit
def unpack_codes(codes, both):
    """Unpack codes to float32; ``both`` are their scales and minimums, bfloat16 in an int32."""
    step = (both << 16).to(tl.float32, bitcast=True)
    base = (both & -65536).to(tl.float32, bitcast=True)
    # Halved in between, because a group may span more than the largest float.
    return (codes.to(tl.float32) * (step * 0.5) + base * 0.5) * 2


@triton.jit
def _elements(
    row,
    cols,
    mask,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
):
    """Read elements in float32: ``row`` are pointers to packed rows, ``cols`` elements of them."""
    g, within = cols // GROUP, cols % GROUP
    if BITS == 4:
        pairs = (tl.minimum(GROUP, DIM - g * GROUP) + 1) // 2
        is_high = within >= pairs
        place = g * (GROUP // 2) + tl.where(is_high, within - pairs, within)
        both = tl.load(row + place, mask=mask, other=0)
        codes = tl.where(is_high, both >> 4, both & 15)
    else:
        codes = tl.load(row + cols, mask=mask, other=0)
    shared = (row + CODE_BYTES + 4 * g).to(tl.pointer_type(tl.bfloat16))
    step = tl.load(shared, mask=mask, other=0.0).to(tl.float32)
    base = tl.load(shared + 1, mask=mask, other=0.0).to(tl.float32)
    # Halved in between, because a group may span more than the largest float.
    return (codes.to(tl.float32) * (step * 0.5) + base * 0.5) * 2


@triton.jit(do_not_specialize=["num_rows", "inner", "packed_outer", "out_outer"])
def _unpack(
    packed,
    out,
    num_rows,
    inner,
    packed_outer,
    packed_inner,
    out_outer,
    out_inner,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer, within = row // inner, row % inner
    source = packed + (outer * packed_outer + within * packed_inner)[:, None]
    target = out + (outer * out_outer + within * out_inner)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows)[:, None] & (cols < DIM)
    values = _elements(source, cols, mask, DIM, GROUP, BITS, CODE_BYTES)
    tl.store(target + cols, values.to(out.dtype.element_ty), mask=mask)
