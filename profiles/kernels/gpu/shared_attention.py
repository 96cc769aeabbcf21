"""Attention of several query heads that share the rows of a packed cache."""

from __future__ import annotations

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


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def attend_shared(
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
    TILE_QUERIES: tl.constexpr,
):
    """Attend with a tile of the query heads of a row, as ``attention`` does with one."""
    TILES: tl.constexpr = (QUERIES + TILE_QUERIES - 1) // TILE_QUERIES
    row = tl.program_id(0).to(tl.int64) // TILES
    query = tl.program_id(0) % TILES * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    is_query = query < QUERIES
    sequence, head = (first_row + row) // KV_HEADS, (first_row + row) % KV_HEADS
    void_from, void_end = 0, 0
    if HAS_VOID_SLOTS:
        void_from = tl.load(void_slots + 2 * sequence)
        void_end = tl.load(void_slots + 2 * sequence + 1)
    GROUP_CODES: tl.constexpr = GROUP * BITS // 8
    col = tl.arange(0, COLS)
    is_code, g = col < CODES, col // GROUP_CODES
    first_half = (g * GROUP + col % GROUP_CODES)[None, :]
    asked = q + sequence * q_stride + (head * QUERIES + query)[:, None] * DIM + first_half
    is_asked = is_query[:, None] & is_code[None, :]
    asked_first = tl.load(asked, mask=is_asked, other=0.0)
    if BITS == 4:
        asked_second = tl.load(asked + GROUP_CODES, mask=is_asked, other=0.0)
    largest = tl.full([TILE_QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([TILE_QUERIES], tl.float32)
    if HAS_SINKS:
        largest = tl.load(sinks + head * QUERIES + query, mask=is_query, other=0.0).to(tl.float32)
        total += 1.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head * QUERIES + query, mask=is_query, other=0.0)[:, None]
    sums_first = tl.zeros([TILE_QUERIES, COLS], tl.float32)
    sums_second = tl.zeros([TILE_QUERIES, COLS], tl.float32)
    cols, groups = col[None, :], g[None, :]
    for first in range(0, tokens, TOKENS):
        slot = first + tl.arange(0, TOKENS)
        is_seen = seen(slot, tokens, void_from, void_end)
        mask = is_seen[:, None] & is_code[None, :]
        keys = context + row * row_stride + slot.to(tl.int64)[:, None] * token_stride
        codes, step, base = packed_tile(keys, cols, groups, mask, CODE_BYTES)
        if BITS == 4:
            second = tl.trans(unpacked(codes >> 4, step, base, q))
            scores = tl.dot(asked_second, second, input_precision="ieee")
            first_codes = tl.trans(unpacked(codes & 15, step, base, q))
            scores = tl.dot(asked_first, first_codes, scores, input_precision="ieee")
        else:
            first_codes = tl.trans(unpacked(codes, step, base, q))
            scores = tl.dot(asked_first, first_codes, input_precision="ieee")
        scores *= scale
        if HAS_SOFT_CAP:
            scores = capped(scores, soft_cap)
        if HAS_SLOPES:
            scores += slope * negative_ages(slot, tokens, void_from, void_end)[None, :]
        scores = tl.where(is_seen[None, :], scores, -float("inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        # The largest score is minus infinity until the first visible slot.
        origin = tl.where(now == -float("inf"), 0.0, now)
        shares, kept = tl.exp(scores - origin[:, None]), tl.exp(largest - origin)
        total = total * kept + tl.sum(shares, 1)
        shares = shares.to(q.dtype.element_ty)
        codes, step, base = packed_tile(keys + value_stride, cols, groups, mask, CODE_BYTES)
        sums_first *= kept[:, None]
        if BITS == 4:
            sums_second *= kept[:, None]
            second = unpacked(codes >> 4, step, base, q)
            sums_second = tl.dot(shares, second, sums_second, input_precision="ieee")
            codes = codes & 15
        values = unpacked(codes, step, base, q)
        sums_first = tl.dot(shares, values, sums_first, input_precision="ieee")
        largest = now
    target = out + (row * QUERIES + query)[:, None] * DIM + first_half
    share = 1 / total[:, None]
    tl.store(target, (sums_first * share).to(out.dtype.element_ty), mask=is_asked)
    if BITS == 4:
        second = (sums_second * share).to(out.dtype.element_ty)
        tl.store(target + GROUP_CODES, second, mask=is_asked)
