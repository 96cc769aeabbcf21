"""Attention of decode that reads a packed cache directly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from profiles.kernels.gpu.attention_tiles import (
    NUMBERS,
    POINTERS,
    capped,
    negative_ages,
    packed_tile,
    seen,
    unpacked,
)
from profiles.kernels.gpu.shared_attention import attend_shared
from profiles.packing import Packing

# Bytes of codes that are unpacked at once, and the warps that do it: for one query head of a row,
# and for all that share it. Larger tiles of the latter do not fit in the registers.
TILE_CODES, NUM_WARPS = 1024, 1
SHARED_CODES, SHARED_WARPS = 2048, 4
# Each dimension of a product of tiles is at least so large.
LEAST_TILE = 16


def attends_packed(packing: Packing) -> bool:
    """Whether ``decode_attention`` supports a packing: equal groups of an even size."""
    group = min(packing.group_size, packing.num_elements)
    return packing.num_elements % group == 0 and group % 2 == 0


def decode_attention(
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
    packing: Packing,
) -> None:
    """See ``profiles.kernels.decode_attention``, for a packed context and dense attention.

    The context is unpacked in registers, a few tokens at a time. Query heads that share a row share
    what is unpacked; they are multiplied in tiles.
    """
    tokens, _, rows, _ = context.shape
    group, dim = out.shape[1:]
    codes = dim * packing.bits // 8
    cols = triton.next_power_of_2(codes)
    is_shared = group > 1 and cols >= LEAST_TILE
    queries = LEAST_TILE if is_shared else 1
    how: dict[str, int] = {"TOKENS": max(1, TILE_CODES // cols), "num_warps": NUM_WARPS}
    if is_shared:
        most = max(LEAST_TILE, SHARED_CODES // cols)
        how = {"TOKENS": most, "TILE_QUERIES": queries, "num_warps": SHARED_WARPS}
        # Bytes cannot be fetched ahead.
        how["num_stages"] = 1
    # Programs of one row are adjacent, so that the row is read from memory once.
    attend = attend_shared if is_shared else _attend
    attend[(rows * triton.cdiv(group, queries),)](
        q,
        context,
        out,
        void_slots,
        sinks,
        slopes,
        tokens,
        first_row,
        scale,
        soft_cap or 1.0,
        q.stride(0),
        context.stride(0),
        context.stride(1),
        context.stride(2),
        KV_HEADS=q.shape[1] // group,
        QUERIES=group,
        DIM=dim,
        GROUP=min(packing.group_size, dim),
        BITS=packing.bits,
        CODE_BYTES=packing.code_bytes,
        CODES=codes,
        COLS=cols,
        HAS_VOID_SLOTS=void_slots is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        HAS_SLOPES=slopes is not None,
        **how,
    )


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def _attend(
    q,
    context,
    out,
    void_slots,
    sinks,
    slopes,
    tokens,
    first_row,
    scale,
    soft_cap,
    q_stride,
    token_stride,
    value_stride,
    row_stride,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    CODES: tl.constexpr,
    COLS: tl.constexpr,
    HAS_VOID_SLOTS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, query = tl.program_id(0).to(tl.int64) // QUERIES, tl.program_id(0) % QUERIES
    sequence, head = (first_row + row) // KV_HEADS, (first_row + row) % KV_HEADS
    void_from, void_end = 0, 0
    if HAS_VOID_SLOTS:
        void_from = tl.load(void_slots + 2 * sequence)
        void_end = tl.load(void_slots + 2 * sequence + 1)
    # A byte of codes is one element, or two: one of each half of a group.
    GROUP_CODES: tl.constexpr = GROUP * BITS // 8
    col = tl.arange(0, COLS)
    is_code, g = col < CODES, col // GROUP_CODES
    first_half = g * GROUP + col % GROUP_CODES
    asked = q + sequence * q_stride + (head * QUERIES + query) * DIM
    asked_first = tl.load(asked + first_half, mask=is_code, other=0.0).to(tl.float32) * scale
    if BITS == 4:
        asked_second = tl.load(asked + first_half + GROUP_CODES, mask=is_code, other=0.0)
        asked_second = asked_second.to(tl.float32) * scale
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        # A sink is the first score, and adds nothing to the values.
        largest = tl.zeros([1], tl.float32) + tl.load(sinks + head * QUERIES + query)
        total += 1.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head * QUERIES + query)
    sums_first, sums_second = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    cols, groups = col[None, :], g[None, :]
    for first in range(0, tokens, TOKENS):
        slot = first + tl.arange(0, TOKENS)
        is_seen = seen(slot, tokens, void_from, void_end)
        mask = is_seen[:, None] & is_code[None, :]
        keys = context + row * row_stride + slot.to(tl.int64)[:, None] * token_stride
        codes, step, base = packed_tile(keys, cols, groups, mask, CODE_BYTES)
        if BITS == 4:
            found = _wide(codes & 15, step, base, q) * asked_first[None, :]
            found += _wide(codes >> 4, step, base, q) * asked_second[None, :]
        else:
            found = _wide(codes, step, base, q) * asked_first[None, :]
        scores = tl.sum(found, 1)
        if HAS_SOFT_CAP:
            scores = capped(scores, soft_cap)
        if HAS_SLOPES:
            scores += slope * negative_ages(slot, tokens, void_from, void_end)
        scores = tl.where(is_seen, scores, -float("inf"))
        now = tl.maximum(largest, tl.max(scores, 0))
        # The largest score is minus infinity until the first visible slot.
        origin = tl.where(now == -float("inf"), 0.0, now)
        shares, kept = tl.exp(scores - origin), tl.exp(largest - origin)
        codes, step, base = packed_tile(keys + value_stride, cols, groups, mask, CODE_BYTES)
        if BITS == 4:
            second = _wide(codes >> 4, step, base, q) * shares[:, None]
            sums_second = sums_second * kept + tl.sum(second, 0)
            codes = codes & 15
        first_values = _wide(codes, step, base, q) * shares[:, None]
        sums_first = sums_first * kept + tl.sum(first_values, 0)
        total = total * kept + tl.sum(shares, 0)
        largest = now
    target = out + (row * QUERIES + query) * DIM + first_half
    tl.store(target, (sums_first / total).to(out.dtype.element_ty), mask=is_code)
    if BITS == 4:
        second = (sums_second / total).to(out.dtype.element_ty)
        tl.store(target + GROUP_CODES, second, mask=is_code)


@triton.jit
def _wide(codes, step, base, like):
    """Unpack codes, round them to the dtype that ``like`` points to, and return float32."""
    return unpacked(codes, step, base, like).to(tl.float32)
