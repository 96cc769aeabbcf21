"""Elements of encoded rows: what the kernels of ``encoded`` share.

A ``unit`` is 32 elements of a row, and an element has a ``place`` in a half of it. Units, places
and the pointers to rows have shapes that broadcast together. So what a unit shares is read once for
all of its elements. The same threads read both halves, because four-bit codes of both are in the
same bytes. Bytes may be at any address: rows of most encodings have no useful alignment. Elements
behind the end of a row have any values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from profiles.encodings import FOUR_BIT_VALUES, NESTED_RUN, NESTED_VALUES, NIBBLE_RUN
from profiles.kernels.encoded_twins import BNB_STEP, IQ4_VALUES
from profiles.kernels.gpu.k_quants import k_quant
from profiles.kernels.gpu.stored_floats import half, signed, stored_float

UNIT: tl.constexpr = tl.constexpr(NIBBLE_RUN)
HALF_UNIT: tl.constexpr = tl.constexpr(NIBBLE_RUN // 2)
_BNB_STEP: tl.constexpr = tl.constexpr(BNB_STEP)
# Parts of the table of four-bit floats: the scales' values, their offset, the scales of runs.
_NESTED_AT: tl.constexpr = tl.constexpr(FOUR_BIT_VALUES)
_OFFSET_AT: tl.constexpr = tl.constexpr(FOUR_BIT_VALUES + NESTED_VALUES)
_RUNS_AT: tl.constexpr = tl.constexpr(FOUR_BIT_VALUES + NESTED_VALUES + 1)
_RUN: tl.constexpr = tl.constexpr(NESTED_RUN)


def _packed_bytes(values: tuple[int, ...]) -> int:
    return int.from_bytes(bytes(value & 255 for value in values), "little", signed=True)


# Eight signed bytes each: a table in two registers.
_IQ4_LOW: tl.constexpr = tl.constexpr(_packed_bytes(IQ4_VALUES[:8]))
_IQ4_HIGH: tl.constexpr = tl.constexpr(_packed_bytes(IQ4_VALUES[8:]))


@triton.jit
def elements(
    row,
    index,
    unit,
    place,
    table,
    dim,
    code_bytes,
    num_groups,
    tile_scales,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_UNITS: tl.constexpr,
):
    """Read the elements of the first halves of units, and those of the second, in float32.

    ``row`` are pointers to the first bytes of rows, and ``index`` the numbers of these rows in the
    matrix of ``table``. ``sizes_of`` and ``constants_of`` give the arguments behind ``table``;
    groups of 0 units are whole rows.
    """
    # Not in a loop with what uses them: bytes are read only once where nothing is stored between.
    first = _half_elements(
        row,
        index,
        unit,
        place,
        table,
        dim,
        code_bytes,
        num_groups,
        tile_scales,
        KIND,
        SCALE,
        ZERO_BITS,
        GROUP_UNITS,
        SCALE_ROWS,
        SCALE_UNITS,
        HALF=0,
    )
    second = _half_elements(
        row,
        index,
        unit,
        place,
        table,
        dim,
        code_bytes,
        num_groups,
        tile_scales,
        KIND,
        SCALE,
        ZERO_BITS,
        GROUP_UNITS,
        SCALE_ROWS,
        SCALE_UNITS,
        HALF=1,
    )
    return first, second


@triton.jit
def _half_elements(
    row,
    index,
    unit,
    place,
    table,
    dim,
    code_bytes,
    num_groups,
    tile_scales,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_UNITS: tl.constexpr,
    HALF: tl.constexpr,
):
    # Of encodings with a byte or more for each element.
    col = tl.minimum(unit * UNIT + HALF * HALF_UNIT + place, dim - 1)
    if KIND == "F32":
        values = stored_float(row, col, "float32")
    elif KIND == "F16":
        values = stored_float(row, col, "float16")
    elif KIND == "BF16":
        values = stored_float(row, col, "bfloat16")
    elif KIND == "E4M3":
        values = _e4m3(tl.load(row + col).to(tl.int32))
        values *= _tile_scale(table, index, unit, tile_scales, SCALE_ROWS, SCALE_UNITS)
    elif SCALE != "":
        scales, group = row + code_bytes, unit * 0
        if GROUP_UNITS > 0:
            group = unit // GROUP_UNITS
        scale = _group_scale(scales, index, group, num_groups, table, SCALE)
        if KIND == "BNB8":
            values = signed(tl.load(row + col)) * scale * _BNB_STEP
        elif KIND == "MAP4":
            values = tl.load(table + _nibble(row + unit * 16, place, HALF)) * scale
        else:
            if KIND == "INT4":
                code = _nibble(row + unit * 16, place, HALF)
            else:
                code = tl.load(row + col).to(tl.int32)
            zero = _zero(scales, group, num_groups, KIND, SCALE, ZERO_BITS)
            values = (code - zero).to(tl.float32) * scale
    elif KIND == "Q2_K" or KIND == "Q3_K" or KIND == "Q4_K" or KIND == "Q5_K" or KIND == "Q6_K":
        values = k_quant(row, unit, place, KIND, HALF)
    else:
        values = _block(row, unit, place, KIND, HALF)
    return values


@triton.jit
def _nibble(codes, place, HALF: tl.constexpr):
    """Read one of 32 codes in 16 bytes, those of the first half in the low bits."""
    return tl.load(codes + place).to(tl.int32) >> HALF * 4 & 15


@triton.jit
def _fifth_bit(bits, place, HALF: tl.constexpr):
    return (tl.load(bits + HALF * 2 + place // 8).to(tl.int32) >> place % 8 & 1) << 4


@triton.jit
def _block(row, unit, place, KIND: tl.constexpr, HALF: tl.constexpr):
    """Read elements of GGUF's blocks of 32. Products with codes are exact, so that a sum with a
    minimum is rounded once, fused or not."""
    if KIND == "Q4_0":
        block = row + unit * 18
        values = (_nibble(block + 2, place, HALF) - 8).to(tl.float32) * half(block)
    elif KIND == "Q4_1":
        block = row + unit * 20
        values = _nibble(block + 4, place, HALF).to(tl.float32) * half(block) + half(block + 2)
    elif KIND == "Q5_0":
        block = row + unit * 22
        code = _nibble(block + 6, place, HALF) | _fifth_bit(block + 2, place, HALF)
        values = (code - 16).to(tl.float32) * half(block)
    elif KIND == "Q5_1":
        block = row + unit * 24
        code = _nibble(block + 8, place, HALF) | _fifth_bit(block + 4, place, HALF)
        values = code.to(tl.float32) * half(block) + half(block + 2)
    elif KIND == "Q8_0":
        block = row + unit * 34
        values = signed(tl.load(block + 2 + HALF * 16 + place)) * half(block)
    elif KIND == "IQ4_NL":
        block = row + unit * 18
        code = _nibble(block + 2, place, HALF)
        eight = tl.where(code < 8, _IQ4_LOW, _IQ4_HIGH)
        values = (eight >> (code % 8 * 8).to(tl.int64)).to(tl.int8).to(tl.float32) * half(block)
    else:
        tl.static_assert(KIND == "MXFP4")
        block = row + unit * 17
        values = _doubled_e2m1(_nibble(block + 1, place, HALF)) * _half_power(block)
    return values


@triton.jit
def _doubled_e2m1(code):
    """A float16 with the same exponent and mantissa is 2^14 times smaller, also if subnormal."""
    bits = (code & 7) << 9 | (code & 8) << 12
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 32768.0


@triton.jit
def _half_power(at):
    """Read e, and return half of 2^(e - 127); the smallest two halves are subnormal."""
    e = tl.load(at).to(tl.int32)
    bits = tl.where(e < 2, 0x200000 * (e + 1), (e - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(code):
    """A float16 with the same exponent and mantissa is 2^8 times smaller, also if subnormal.

    Triton's own conversion needs a GPU that has the type."""
    bits = (code & 127) << 7 | (code & 128) << 8
    values = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 127) == 127, float("nan"), values)


@triton.jit
def _tile_scale(
    table, index, unit, tile_scales, SCALE_ROWS: tl.constexpr, SCALE_UNITS: tl.constexpr
):
    down, across = index * 0, unit * 0
    if SCALE_ROWS > 0:
        down = index // SCALE_ROWS
    if SCALE_UNITS > 0:
        across = unit // SCALE_UNITS
    return tl.load(table + down * tile_scales + across)


@triton.jit
def _group_scale(scales, index, group, num_groups, table, SCALE: tl.constexpr):
    if SCALE == "code":
        value = tl.load(table + _NESTED_AT + tl.load(scales + group).to(tl.int32))
        of_run = tl.load(table + _RUNS_AT + (index * num_groups + group) // _RUN)
        scale = value * of_run + tl.load(table + _OFFSET_AT)
    else:
        scale = stored_float(scales, group, SCALE)
    return scale


@triton.jit
def _zero(
    scales,
    group,
    num_groups,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO_BITS: tl.constexpr,
):
    if ZERO_BITS == 0:
        zero = 8 if KIND == "INT4" else 128
    else:
        zeros = scales + num_groups * (4 if SCALE == "float32" else 2)
        if ZERO_BITS == 4:
            zero = tl.load(zeros + group // 2).to(tl.int32) >> group % 2 * 4 & 15
        else:
            zero = tl.load(zeros + group).to(tl.int32)
    return zero
