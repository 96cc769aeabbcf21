"""Encoded matrices on a GPU: unpacking."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from profiles.encodings import NIBBLE_RUN, Encoding
from profiles.kernels.encoded_matrix import EncodedMatrix
from profiles.kernels.gpu.elements import HALF_UNIT, UNIT, elements

# Units that one program unpacks: of one row, or of some that are shorter.
PROGRAM_UNITS = 64


def unpack_encoded(matrix: EncodedMatrix, out: torch.Tensor) -> None:
    """See ``profiles.kernels.unpack_encoded``, for columns in the order of the inputs."""
    num_units = triton.cdiv(matrix.num_elements, NIBBLE_RUN)
    units = min(PROGRAM_UNITS, triton.next_power_of_2(num_units))
    rows = PROGRAM_UNITS // units
    _unpack[(triton.cdiv(len(out), rows), triton.cdiv(num_units, units))](
        matrix.rows,
        out,
        matrix.table,
        len(out),
        matrix.first_row,
        matrix.rows.stride(0),
        out.stride(0),
        *sizes_of(matrix),
        **constants_of(matrix.encoding),
        ROWS=rows,
        UNITS=units,
        # Two roundings that follow each other must stay two.
        enable_fp_fusion=False,
    )


def sizes_of(matrix: EncodedMatrix) -> tuple[int, int, int, int]:
    """Return the sizes of a row that ``elements`` takes: kernels are compiled for any."""
    how, width = matrix.encoding, matrix.num_elements
    return width, how.code_bytes(width), how.num_groups(width), how.tile_scales(width)


def constants_of(encoding: Encoding) -> dict[str, Any]:
    """Return the constants of ``elements``: kernels are compiled for each encoding."""
    return {
        "KIND": encoding.kind.name,
        "SCALE": encoding.scale,
        "ZERO_BITS": encoding.zero_bits,
        "GROUP_UNITS": encoding.group_elements // NIBBLE_RUN,
        "SCALE_ROWS": encoding.tile_rows,
        "SCALE_UNITS": encoding.tile_columns // NIBBLE_RUN,
    }


# Arguments that change from call to call must not trigger a new compilation.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "first_row",
        "row_stride",
        "out_stride",
        "dim",
        "code_bytes",
        "num_groups",
        "tile_scales",
    ],
    do_not_specialize_on_alignment=["rows", "out", "table"],
)
def _unpack(
    rows,
    out,
    table,
    num_rows,
    first_row,
    row_stride,
    out_stride,
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
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    i = tl.arange(0, ROWS * UNITS)[:, None]
    row, unit = tl.program_id(0) * ROWS + i // UNITS, tl.program_id(1) * UNITS + i % UNITS
    is_inside = (row < num_rows) & (unit * UNIT < dim)
    # Beyond the last row and the last unit, these are read again.
    row = tl.minimum(row, num_rows - 1).to(tl.int64)
    unit = tl.minimum(unit, (dim - 1) // UNIT)
    source, index = rows + row * row_stride, first_row + row
    place = tl.arange(0, HALF_UNIT)[None, :]
    first, second = elements(
        source,
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
    )
    col = unit * UNIT + place
    target = out + row * out_stride + col
    tl.store(target, first.to(out.dtype.element_ty), mask=is_inside & (col < dim))
    is_inside = is_inside & (col + HALF_UNIT < dim)
    tl.store(target + HALF_UNIT, second.to(out.dtype.element_ty), mask=is_inside)
