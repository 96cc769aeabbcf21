"""Encoded rows in plain torch: a reference for the kernels, and a fallback where they are missing.

Elements are computed in float32, with the roundings of the formats' own readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from profiles.encodings import FOUR_BIT_VALUES, NESTED_RUN, NESTED_VALUES, Encoding, Kind
from profiles.kernels.k_quant_twins import DECODERS as K_QUANTS

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1, doubled.
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
BNB_STEP = 7.874015718698502e-3
_SCALES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unpack_encoded_twin(
    rows: torch.Tensor,
    encoding: Encoding,
    num_elements: int,
    table: torch.Tensor | None,
    first_row: int,
) -> torch.Tensor:
    """Return the elements of uint8 [rows, row_bytes] as float32 [rows, num_elements].

    ``first_row`` is the number of the first of them among the rows of the matrix of the table.
    """
    kind = encoding.kind
    if kind in _PLAIN:
        return rows.contiguous().view(_PLAIN[kind]).float()
    if kind in _BLOCKS:
        blocks = rows.reshape(-1, encoding.block_bytes)
        return _BLOCKS[kind](blocks).reshape(len(rows), num_elements)
    codes = rows[:, : encoding.code_bytes(num_elements)]
    if kind is Kind.E4M3:
        assert table is not None
        scales = _tile_scales(encoding, len(rows), num_elements, table, first_row)
        return codes.contiguous().view(torch.float8_e4m3fn).float() * scales
    scales = _group_scales(rows, encoding, num_elements, table, first_row)
    if kind is Kind.BNB8:
        return codes.view(torch.int8).float() * scales * BNB_STEP
    if kind is not Kind.INT8:
        codes = nibbles(codes.reshape(-1, encoding.block_bytes)).reshape(len(rows), -1)
        codes = codes[:, :num_elements]
    if kind is Kind.MAP4:
        assert table is not None
        return table[:FOUR_BIT_VALUES][codes.long()] * scales
    zeros = _zeros(rows, encoding, num_elements)
    return (codes.float() - zeros) * scales


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return the low halves of bytes in the last dimension, then the high ones."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def half_at(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 of each block at a byte, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _tile_scales(
    encoding: Encoding, num_rows: int, num_elements: int, table: torch.Tensor, first_row: int
) -> torch.Tensor:
    scales = table.view(-1, encoding.tile_scales(num_elements))
    down = torch.arange(first_row, first_row + num_rows, device=table.device)
    of_rows = scales[down // encoding.tile_rows if encoding.tile_rows else down * 0]
    if not encoding.tile_columns:
        return of_rows
    return of_rows.repeat_interleave(encoding.tile_columns, dim=1)[:, :num_elements]


def _group_scales(
    rows: torch.Tensor,
    encoding: Encoding,
    num_elements: int,
    table: torch.Tensor | None,
    first_row: int,
) -> torch.Tensor:
    """Return the scale of each element; of each row where it has only one."""
    start, groups = encoding.code_bytes(num_elements), encoding.num_groups(num_elements)
    if encoding.scale == "code":
        assert table is not None
        values, rest = table[FOUR_BIT_VALUES:].split([NESTED_VALUES, len(table) - 272])
        codes = rows[:, start : start + groups].long()
        order = torch.arange(rows.shape[0] * groups, device=rows.device) + first_row * groups
        scales = values[codes] * rest[1:][order // NESTED_RUN].view_as(codes) + rest[0]
    else:
        dtype = _SCALES[encoding.scale]
        stored = rows[:, start : start + groups * dtype.itemsize]
        scales = stored.contiguous().view(dtype).float()
    return _spread(scales, encoding, num_elements)


def _zeros(rows: torch.Tensor, encoding: Encoding, num_elements: int) -> torch.Tensor | float:
    if not encoding.zero_bits:
        return 8.0 if encoding.kind is Kind.INT4 else 128.0
    groups = encoding.num_groups(num_elements)
    zeros = rows[:, encoding.row_bytes(num_elements) - -(-groups * encoding.zero_bits // 8) :]
    if encoding.zero_bits == 4:
        zeros = torch.stack([zeros & 15, zeros >> 4], dim=-1).flatten(1)[:, :groups]
    return _spread(zeros.float(), encoding, num_elements)


def _spread(of_groups: torch.Tensor, encoding: Encoding, num_elements: int) -> torch.Tensor:
    if not encoding.group_elements:
        return of_groups
    return of_groups.repeat_interleave(encoding.group_elements, dim=1)[:, :num_elements]


def _values(values: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[nibbles(codes).long()]


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (nibbles(blocks[:, 2:]).float() - 8) * half_at(blocks, 0)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return nibbles(blocks[:, 4:]).float() * half_at(blocks, 0) + half_at(blocks, 2)


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, at : at + 4, None] >> bits & 1) << 4).flatten(1)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (codes.float() - 16) * half_at(blocks, 0)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes.float() * half_at(blocks, 0) + half_at(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * half_at(blocks, 0)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _values(IQ4_VALUES, blocks[:, 2:]) * half_at(blocks, 0)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Half of 2^(e - 127) times the doubled values; the smallest two halves are subnormal."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _values(_FP4, blocks[:, 1:]) * bits.view(torch.float32)


_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_BLOCKS: Mapping[Kind, Callable[[torch.Tensor], torch.Tensor]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.IQ4_NL: _iq4_nl,
    Kind.MXFP4: _mxfp4,
    **K_QUANTS,
}
