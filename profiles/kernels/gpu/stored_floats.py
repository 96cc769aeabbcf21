"""Numbers of one to four bytes, in float32.

They are read byte by byte, because a GPU reads words only at multiples of their size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half(at):
    """Read a float16."""
    return _two_bytes(at).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def stored_float(start, number, DTYPE: tl.constexpr):
    """Read one of the floats from ``start`` on; ``DTYPE`` is the name of their dtype."""
    if DTYPE == "float16":
        value = half(start + 2 * number)
    elif DTYPE == "bfloat16":
        value = (_two_bytes(start + 2 * number) << 16).to(tl.float32, bitcast=True)
    else:
        tl.static_assert(DTYPE == "float32")
        at = start + 4 * number
        bits = _two_bytes(at) | _two_bytes(at + 2) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def signed(byte):
    """Return signed bytes as floats."""
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _two_bytes(at):
    return tl.load(at).to(tl.int32) | tl.load(at + 1).to(tl.int32) << 8
