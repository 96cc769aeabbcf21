"""Slopes of ALiBi (Press et al. 2022)."""

from __future__ import annotations

import struct

from costmodel.model.attention_spec import check_heads


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Return the slope of each head: a geometric sequence that ends at 2^-8.

    Where ``num_heads`` is no power of two, the sequence of the power below it comes first, then
    every other number of the sequence of twice that power.
    """
    check_heads(num_heads)
    power = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    more = [2.0 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return tuple(first + more)


def to_bfloat16(value: float) -> float:
    """Round a positive number to the nearest bfloat16, to an even one where two are as near."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + (bits >> 16 & 1)
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))
    return float(rounded)
