"""GGUF's blocks of 256 elements: two levels of scales.

A block has eight units. Products of a scale, its own scale and a code are exact in float32, so that
only the difference with a minimum is rounded, fused or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from profiles.kernels.gpu.stored_floats import half, signed


@triton.jit
def k_quant(row, unit, place, KIND: tl.constexpr, HALF: tl.constexpr):
    """Read elements in float32; see ``elements`` for the arguments."""
    number, part, within = unit >> 3, unit & 7, HALF * 16 + place
    if KIND == "Q2_K":
        values = _q2_k(row + number * 84, part, within, HALF)
    elif KIND == "Q3_K":
        values = _q3_k(row + number * 110, part, within, HALF)
    elif KIND == "Q4_K":
        block = row + number * 144
        values = _with_minimum(block, part, _code(block + 16, part // 2, part % 2 * 4, within) & 15)
    elif KIND == "Q5_K":
        block = row + number * 176
        low = _code(block + 48, part // 2, part % 2 * 4, within) & 15
        values = _with_minimum(block, part, low | (_code(block + 16, 0, part, within) & 1) << 4)
    else:
        tl.static_assert(KIND == "Q6_K")
        values = _q6_k(row + number * 210, part, within, HALF)
    return values


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _code(codes, run, shift, within):
    """Read bytes of one of the runs of 32, and shift them to the right."""
    return _byte(codes + run * 32 + within) >> shift


@triton.jit
def _q2_k(block, part, within, HALF: tl.constexpr):
    code = _code(block + 16, part // 4, part % 4 * 2, within) & 3
    both = _byte(block + part * 2 + HALF)
    step = half(block + 80) * (both & 15).to(tl.float32)
    least = half(block + 82) * (both >> 4).to(tl.float32)
    return code.to(tl.float32) * step - least


@triton.jit
def _q3_k(block, part, within, HALF: tl.constexpr):
    low = _code(block + 32, part // 4, part % 4 * 2, within) & 3
    # Without the bit of the mask, a code is four less.
    code = low - 4 + ((_code(block, 0, part, within) & 1) << 2)
    i = part * 2 + HALF
    four = _byte(block + 96 + i % 8) >> i // 8 * 4 & 15
    two = _byte(block + 104 + i % 4) >> i // 4 * 2 & 3
    scale = ((four | two << 4) - 32).to(tl.float32)
    return code.to(tl.float32) * (half(block + 108) * scale)


@triton.jit
def _with_minimum(block, part, code):
    """Return codes times their scale less their minimum: 6 bits of 12 bytes each."""
    i, is_low = part % 4, part < 4
    first, second, last = _byte(block + 4 + i), _byte(block + 8 + i), _byte(block + 12 + i)
    scale = tl.where(is_low, first & 63, last & 15 | first >> 2 & 48)
    minimum = tl.where(is_low, second & 63, last >> 4 | second >> 2 & 48)
    step, least = half(block) * scale.to(tl.float32), half(block + 2) * minimum.to(tl.float32)
    return code.to(tl.float32) * step - least


@triton.jit
def _q6_k(block, part, within, HALF: tl.constexpr):
    run, quarter = part // 4, part % 4
    low = _code(block, run * 2 + quarter % 2, quarter // 2 * 4, within) & 15
    high = _code(block + 128, run, quarter * 2, within) & 3
    scale = signed(tl.load(block + 192 + part * 2 + HALF))
    return ((low | high << 4) - 32).to(tl.float32) * (half(block + 208) * scale)
