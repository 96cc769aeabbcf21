"""Encoded matrices for tests, and their values in plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.integrations.gguf import dequant

from profiles.encodings import (
    BLOCK_ENCODINGS,
    BNB_INT8,
    Encoding,
    Kind,
    four_bit_floats,
    fp8,
    integers,
)
from profiles.kernels import EncodedMatrix

# Groups that end within a row, whole rows, odd numbers of groups, tiles that end within both sides.
OTHERS = (
    (integers(4, 128, "float16", has_zeros=True), 640),
    (integers(4, 32, "bfloat16", has_zeros=False), 96),
    (integers(4, 64, "float32", has_zeros=True), 120),
    (integers(4, 0, "float16", has_zeros=False), 200),
    (integers(8, 128, "float16", has_zeros=True), 384),
    (integers(8, 0, "bfloat16", has_zeros=False), 77),
    (fp8(128, 128), 1160),
    (fp8(1, 0), 70),
    (fp8(0, 0), 64),
    (four_bit_floats(64, is_nested=True), 1088),
    (four_bit_floats(128, is_nested=False), 256),
    (BNB_INT8, 150),
)
CASES = [
    *((encoding, 3 * encoding.block_elements) for encoding in BLOCK_ENCODINGS.values()),
    *((encoding, 2048) for encoding in BLOCK_ENCODINGS.values()),
    *OTHERS,
]
IDS = [f"{encoding.name}-{width}" for encoding, width in CASES]
# Infinities, NaN, the smallest and the largest subnormal, negative zero.
SPECIAL_HALVES = (b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\x01\x00", b"\xff\x03", b"\x00\x80")
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
# Those that transformers has a reader for.
GGML_TYPES = {name: number for number, name in dequant.GGML_NAME.items()}


def sound_matrix(encoding: Encoding, outputs: int, width: int, seed: int = 0) -> EncodedMatrix:
    """Make a matrix of random codes whose values are of the size of one."""
    generator = torch.Generator().manual_seed(seed)
    total = encoding.table_elements(outputs, width)
    table = torch.randn(total, generator=generator) if encoding.has_table else None
    rows = _random_bytes(outputs, encoding.row_bytes(width), generator)
    matrix = EncodedMatrix(rows=rows, encoding=encoding, num_elements=width, table=table)
    _set_scales(matrix, generator)
    return matrix


def _random_bytes(rows: int, row_bytes: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, generator=generator)


def _set_scales(matrix: EncodedMatrix, generator: torch.Generator) -> None:
    """Replace what is read as a float by a sound one."""
    encoding, rows = matrix.encoding, matrix.rows
    if encoding.kind is Kind.E4M3:
        rows[(rows & 127) == 127] = 3
    if encoding.is_plain:
        values = torch.randn(len(rows), matrix.num_elements, generator=generator)
        rows.copy_(values.to(PLAIN[encoding.kind]).view(torch.uint8))
    elif _has_scales_inside(encoding):
        blocks = rows.view(len(rows), -1, encoding.block_bytes)
        if encoding.kind is Kind.MXFP4:
            blocks[..., 0] = 120 + blocks[..., 0] % 10
        for at in encoding.halves_at:
            halves = torch.rand(*blocks.shape[:2], 1, generator=generator).half() / 16
            blocks[..., at : at + 2] = halves.view(torch.uint8)
    elif encoding.scale and encoding.scale != "code":
        start, groups = (
            of(matrix.num_elements) for of in (encoding.code_bytes, encoding.num_groups)
        )
        scales = torch.randn(len(rows), groups, generator=generator)
        stored = scales.to(getattr(torch, encoding.scale)).view(torch.uint8)
        rows[:, start : start + stored.shape[1]] = stored


def all_matrices(encoding: Encoding, width: int) -> Iterator[EncodedMatrix]:
    """Yield sound rows; rows of any bytes and of equal ones, with a table of any floats; and blocks
    with each special scale."""
    yield sound_matrix(encoding, 40, width)
    generator = torch.Generator().manual_seed(1)
    rows = _random_bytes(300, encoding.row_bytes(width), generator)
    rows[:256] = torch.arange(256, dtype=torch.uint8)[:, None]
    total, table = encoding.table_elements(len(rows), width), None
    if encoding.has_table:
        table = _random_bytes(total, 4, generator).view(torch.float32).flatten()
    yield EncodedMatrix(rows=rows, encoding=encoding, num_elements=width, table=table)
    for special in SPECIAL_HALVES:
        for at in encoding.halves_at:
            matrix = sound_matrix(encoding, 3, width)
            blocks = matrix.rows.view(3, -1, encoding.block_bytes)
            blocks[..., at : at + 2] = torch.frombuffer(bytearray(special), dtype=torch.uint8)
            yield matrix


def reference(matrix: EncodedMatrix) -> torch.Tensor:
    """Return the float32 elements, by transformers or else row by row in plain arithmetic."""
    encoding = matrix.encoding
    if encoding.name in GGML_TYPES:
        flat: torch.Tensor = dequant.dequantize(
            matrix.rows, GGML_TYPES[encoding.name], torch.float32
        )
        return flat.view(-1, matrix.num_elements)
    if encoding.is_plain:
        return matrix.rows.view(PLAIN[encoding.kind]).float()
    read = _block_values if _has_scales_inside(encoding) else _group_values
    with np.errstate(all="ignore"):
        rows = [read(matrix, row, r) for r, row in enumerate(matrix.rows.numpy())]
    return torch.from_numpy(np.asarray(rows, dtype=np.float32))


def _has_scales_inside(encoding: Encoding) -> bool:
    return not encoding.scale and encoding.kind is not Kind.E4M3


def _block_values(matrix: EncodedMatrix, row: Any, _: int) -> Any:
    encoding, d = matrix.encoding, np.arange(matrix.num_elements)
    within = d % encoding.block_elements
    start = d // encoding.block_elements * encoding.block_bytes

    def half(at: int) -> Any:
        low, high = row[start + at].astype(np.uint16), row[start + at + 1].astype(np.uint16)
        return (low | high << 8).view(np.float16).astype(np.float32)

    def nibble(at: int) -> Any:
        return (row[start + at + within % 16] >> 4 * (within // 16)) & 15

    def fifth(at: int) -> Any:
        return (row[start + at + within // 8] >> within % 8 & 1) << 4

    if encoding.kind is Kind.Q5_0:
        return half(0) * ((nibble(6) | fifth(2)).astype(np.float32) - 16)
    if encoding.kind is Kind.Q5_1:
        return half(0) * (nibble(8) | fifth(4)).astype(np.float32) + half(2)
    assert encoding.kind is Kind.MXFP4
    powers = np.ldexp(1.0, row[start].astype(np.int64) - 127)
    return (np.array(FP4)[nibble(1)] * powers).astype(np.float32)


def _group_values(matrix: EncodedMatrix, row: Any, r: int) -> Any:
    encoding, width, f32 = matrix.encoding, matrix.num_elements, np.float32
    d = np.arange(width)
    table: Any = np.empty(0, f32) if matrix.table is None else matrix.table.numpy()
    if encoding.kind is Kind.E4M3:
        down = r // encoding.tile_rows if encoding.tile_rows else 0
        across = d // encoding.tile_columns if encoding.tile_columns else d * 0
        codes = torch.from_numpy(row.copy()).view(torch.float8_e4m3fn)
        return codes.float().numpy() * table.reshape(-1, across[-1] + 1)[down, across]
    size = encoding.group_elements or width
    groups, end = -(-width // size), encoding.code_bytes(width)
    stored = row[end:]
    if encoding.scale == "code":
        number = r * groups + np.arange(groups)
        scales = table[16 + stored.astype(int)] * table[273 + number // 256] + table[272]
    else:
        dtype = getattr(torch, encoding.scale)
        stored, zeros = np.split(stored, [groups * dtype.itemsize])
        scales = torch.from_numpy(stored.copy()).view(dtype).float().numpy()
    scales = scales[d // size]
    codes = row[d] if encoding.block_elements == 1 else row[d // 32 * 16 + d % 16]
    if encoding.block_elements > 1:
        codes = codes >> 4 * (d % 32 // 16) & 15
    if encoding.kind is Kind.MAP4:
        return table[codes] * scales
    if encoding.kind is Kind.BNB8:
        return codes.view(np.int8).astype(f32) * scales * f32(7.874015718698502e-3)
    if encoding.zero_bits == 4:
        zeros = (zeros[d // size // 2] >> 4 * (d // size % 2)) & 15
    elif encoding.zero_bits:
        zeros = zeros[d // size]
    else:
        zeros = np.full(width, 8 if encoding.kind is Kind.INT4 else 128)
    return (codes.astype(f32) - zeros.astype(f32)) * scales
