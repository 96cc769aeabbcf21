"""Tiles of a packed cache: what the kernels of attention share."""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that change from call to call must not trigger a new compilation.
NUMBERS = ["tokens", "first_row", "q_stride", "token_stride", "value_stride", "row_stride"]
POINTERS = ["q", "context", "out", "void_slots", "sinks", "slopes"]


@triton.jit
def seen(slot, tokens, void_from, void_end):
    """Return which slots a query may attend to."""
    before, behind = slot < void_from, slot >= void_end
    is_seen = tl.where(void_from > void_end, before & behind, before | behind)
    return is_seen & (slot < tokens)


@triton.jit
def capped(scores, soft_cap):
    """Cap scores softly: tanh by the exponential, which every version of Triton has."""
    return soft_cap * (1 - 2 / (tl.exp(scores * (2 / soft_cap)) + 1))


@triton.jit
def negative_ages(slot, tokens, void_from, void_end):
    """Return the tokens from the newest back to each, as negative numbers: slots before the void
    ones are that much nearer."""
    nearer = tl.where(slot < void_from, void_end - void_from, 0)
    return (slot - (tokens - 1) + nearer).to(tl.float32)


@triton.jit
def packed_tile(rows, cols, groups, mask, CODE_BYTES: tl.constexpr):
    """Read bytes of codes of packed rows, with the scale and the minimum of each byte's group."""
    codes = tl.load(rows + cols, mask=mask, other=0)
    # Both in one word of 4 bytes, bfloat16 each: the upper halves of a float32.
    shared = (rows + CODE_BYTES + 4 * groups).to(tl.pointer_type(tl.int32))
    both = tl.load(shared, mask=mask, other=0)
    return (
        codes,
        (both << 16).to(tl.float32, bitcast=True),
        (both & -65536).to(tl.float32, bitcast=True),
    )


@triton.jit
def unpacked(codes, step, base, like):
    """Unpack codes to the dtype that ``like`` points to."""
    # Halved in between, because a group may span more than the largest float.
    wide = (codes.to(tl.float32) * (step * 0.5) + base * 0.5) * 2
    return wide.to(like.dtype.element_ty)
