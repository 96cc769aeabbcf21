"""How files store the elements of a matrix: its encodings, as data. No torch.

An encoded matrix is one run of bytes a row, all of the same length, so that rows can be cut, moved
and read alone. What many rows share (the scales of FP8's tiles, the second level of NF4's scales)
is a small table beside them.

Three forms hold what files contain:

- blocks, as GGUF has them: the scales are inside. Rows are those of the file, byte for byte;
- codes, then the scales of the row's groups, then their zero points: integers of GPTQ, AWQ and
  compressed-tensors, and the floats of bitsandbytes. ``executor.checkpoint.repacking`` makes them
  without loss from tensors in which codes, scales and zero points are apart;
- codes alone, and a table of scales: FP8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from profiles.errors import InputError

# Integers in 4 bits are stored by 32: byte i has code i in its low half, code i + 16 in its high.
NIBBLE_RUN = 32
SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "code": 1}
# A table of bitsandbytes: what 4 bits mean; and where scales are codes, what those mean, their
# offset, and then the scale of each run of so many of them.
FOUR_BIT_VALUES = 16
NESTED_VALUES = 256
NESTED_RUN = 256


class Kind(IntEnum):
    """The arithmetic of a decoder, by its number in ``encodings.h``."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q5_0 = 5
    Q5_1 = 6
    Q8_0 = 7
    Q2_K = 8
    Q3_K = 9
    Q4_K = 10
    Q5_K = 11
    Q6_K = 12
    IQ4_NL = 13
    MXFP4 = 14
    INT4 = 15
    INT8 = 16
    E4M3 = 17
    MAP4 = 18
    BNB8 = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One way to store rows of elements.

    Parameters
    ----------
    name
        By which ``find_encoding`` finds it.
    kind
        The arithmetic that gives the elements.
    block_elements, block_bytes
        Elements that are coded together, and the bytes of their codes, including their scales where
        those are inside.
    group_elements
        Elements that share a scale behind the row's codes; 0 where all of the row do.
    scale
        What the scales behind the codes are: a dtype's name, or ``code`` for a byte that the table
        gives a meaning. Empty where there are none.
    zero_bits
        Bits of the zero point of each group, behind the scales; 0 where there is none.
    tile_rows, tile_columns
        Elements that share a scale of the table; 0 for all rows, and for all columns.
    halves_at
        Bytes of a block at which a float16 begins: its scale, its minimum.
    """

    name: str
    kind: Kind
    block_elements: int
    block_bytes: int
    group_elements: int = 0
    scale: str = ""
    zero_bits: int = 0
    tile_rows: int = 0
    tile_columns: int = 0
    halves_at: tuple[int, ...] = ()

    @property
    def has_table(self) -> bool:
        """Whether rows need a table beside them."""
        return self.kind in (Kind.E4M3, Kind.MAP4)

    @property
    def is_plain(self) -> bool:
        """Whether an element is a float as it is."""
        return self.kind in (Kind.F32, Kind.F16, Kind.BF16)

    def fits(self, num_elements: int) -> bool:
        """Whether rows of so many elements can be stored.

        Blocks of GGUF have no end that is shorter. Groups may have one.
        """
        return num_elements > 0 and (bool(self.scale) or num_elements % self.block_elements == 0)

    def num_groups(self, num_elements: int) -> int:
        """Scales behind the codes of a row."""
        if not self.scale:
            return 0
        return -(-num_elements // self.group_elements) if self.group_elements else 1

    def code_bytes(self, num_elements: int) -> int:
        """Bytes of a row's blocks."""
        return -(-num_elements // self.block_elements) * self.block_bytes

    def row_bytes(self, num_elements: int) -> int:
        """Bytes of a row: its blocks, its scales, its zero points."""
        assert self.fits(num_elements)
        groups = self.num_groups(num_elements)
        scales = groups * SCALE_BYTES[self.scale] if self.scale else 0
        return self.code_bytes(num_elements) + scales + -(-groups * self.zero_bits // 8)

    def table_elements(self, num_rows: int, num_elements: int) -> int:
        """Floats (float32) of the table of a matrix; 0 without a table."""
        if self.kind is Kind.E4M3:
            down = -(-num_rows // self.tile_rows) if self.tile_rows else 1
            return down * self.tile_scales(num_elements)
        if self.kind is Kind.MAP4 and self.scale == "code":
            scales = num_rows * self.num_groups(num_elements)
            return FOUR_BIT_VALUES + NESTED_VALUES + 1 + -(-scales // NESTED_RUN)
        return FOUR_BIT_VALUES if self.kind is Kind.MAP4 else 0

    def tile_scales(self, num_elements: int) -> int:
        """Scales of the table that one row uses."""
        return -(-num_elements // self.tile_columns) if self.tile_columns else 1


def _blocks(kind: Kind, elements: int, num_bytes: int, *halves_at: int) -> Encoding:
    return Encoding(
        name=kind.name,
        kind=kind,
        block_elements=elements,
        block_bytes=num_bytes,
        halves_at=halves_at,
    )


# GGUF's, by its names. gpt-oss ships MXFP4 in another order of its codes.
BLOCK_ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        _blocks(Kind.F32, 1, 4),
        _blocks(Kind.F16, 1, 2),
        _blocks(Kind.BF16, 1, 2),
        _blocks(Kind.Q4_0, 32, 18, 0),
        _blocks(Kind.Q4_1, 32, 20, 0, 2),
        _blocks(Kind.Q5_0, 32, 22, 0),
        _blocks(Kind.Q5_1, 32, 24, 0, 2),
        _blocks(Kind.Q8_0, 32, 34, 0),
        _blocks(Kind.Q2_K, 256, 84, 80, 82),
        _blocks(Kind.Q3_K, 256, 110, 108),
        _blocks(Kind.Q4_K, 256, 144, 0, 2),
        _blocks(Kind.Q5_K, 256, 176, 0, 2),
        _blocks(Kind.Q6_K, 256, 210, 208),
        _blocks(Kind.IQ4_NL, 32, 18, 0),
        _blocks(Kind.MXFP4, 32, 17),
    )
}
BNB_INT8 = Encoding(
    name="BNB8", kind=Kind.BNB8, block_elements=1, block_bytes=1, scale="float32", group_elements=0
)
_SCALE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INTEGER = re.compile(r"INT([48])_G(\d{1,6})_(F32|F16|BF16)(_Z)?")
_FP8 = re.compile(r"E4M3_(\d{1,6})X(\d{1,6})")
_MAP = re.compile(r"MAP4_G(\d{1,6})(_NESTED)?")


def integers(bits: int, group_elements: int, scale: str, *, has_zeros: bool) -> Encoding:
    """Return the encoding of integers in groups: ``scale * (code - zero)``.

    Without zero points of its own a group's zero is half of the codes: 8 or 128.

    Parameters
    ----------
    bits
        4 or 8.
    group_elements
        A power of two from 32 on; 0 for one scale a row.
    scale
        ``float32``, ``float16`` or ``bfloat16``.
    """
    assert bits in (4, 8)
    check_group(group_elements)
    short = next(short for short, dtype in _SCALE_NAMES.items() if dtype == scale)
    return Encoding(
        name=f"INT{bits}_G{group_elements}_{short}{'_Z' * has_zeros}",
        kind=Kind.INT4 if bits == 4 else Kind.INT8,
        block_elements=NIBBLE_RUN if bits == 4 else 1,
        block_bytes=NIBBLE_RUN // 2 if bits == 4 else 1,
        group_elements=group_elements,
        scale=scale,
        zero_bits=bits if has_zeros else 0,
    )


def fp8(tile_rows: int, tile_columns: int) -> Encoding:
    """Return the encoding of 8-bit floats (E4M3, without infinities) with a table of scales.

    0 stands for all rows, and for all columns: ``fp8(1, 0)`` has one scale a row.
    """
    check_group(tile_columns)
    return Encoding(
        name=f"E4M3_{tile_rows}X{tile_columns}",
        kind=Kind.E4M3,
        block_elements=1,
        block_bytes=1,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
    )


def four_bit_floats(group_elements: int, *, is_nested: bool) -> Encoding:
    """Return the encoding of bitsandbytes: 16 values from the table, times a group's scale.

    Parameters
    ----------
    is_nested
        Whether scales are bytes with scales of their own ("double quantization").
    """
    check_group(group_elements)
    return Encoding(
        name=f"MAP4_G{group_elements}{'_NESTED' * is_nested}",
        kind=Kind.MAP4,
        block_elements=NIBBLE_RUN,
        block_bytes=NIBBLE_RUN // 2,
        group_elements=group_elements,
        scale="code" if is_nested else "float32",
    )


def check_group(elements: int) -> None:
    """Raise ``InputError`` for groups that no kernel reads: a power of two from 32 on, or 0."""
    if elements and (elements < NIBBLE_RUN or elements & (elements - 1)):
        raise InputError(
            "elements that share a scale", got=elements, allowed="32, 64, 128, 256, ... or a row"
        )


@cache
def find_encoding(name: str) -> Encoding:
    """Return an encoding by its name; raises ``InputError`` for an unknown one."""
    if name in BLOCK_ENCODINGS:
        return BLOCK_ENCODINGS[name]
    if name == BNB_INT8.name:
        return BNB_INT8
    if found := _INTEGER.fullmatch(name):
        bits, group, scale, zeros = found.groups()
        return integers(int(bits), int(group), _SCALE_NAMES[scale], has_zeros=zeros is not None)
    if found := _FP8.fullmatch(name):
        return fp8(int(found[1]), int(found[2]))
    if found := _MAP.fullmatch(name):
        return four_bit_floats(int(found[1]), is_nested=found[2] is not None)
    known = ", ".join(BLOCK_ENCODINGS)
    raise InputError(
        "encoding",
        got=name,
        allowed=f"{known}, {BNB_INT8.name}, or as INT4_G128_F16_Z, E4M3_128X128, MAP4_G64_NESTED",
    )
