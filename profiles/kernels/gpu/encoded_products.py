"""Products of few rows with encoded matrices, whose elements are decoded in registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from profiles.encodings import NIBBLE_RUN
from profiles.kernels.encoded_matrix import EncodedMatrix
from profiles.kernels.gpu.elements import HALF_UNIT, UNIT, elements
from profiles.kernels.gpu.encoded import constants_of, sizes_of

# Rows and outputs of a tile, for groups of few rows and for larger ones. With few outputs, one row
# has work for many processors.
FEW_ROWS, FEW_OUTPUTS = 16, 32
MANY_ROWS, MANY_OUTPUTS = 64, 64
# Bytes of inputs at once.
DEPTH_BYTES = 256


def multiply_encoded(
    x: torch.Tensor,
    matrix: EncodedMatrix,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    adds: bool = False,
) -> None:
    """See ``profiles.kernels.multiply_encoded``, for columns in the order of the inputs.

    This allocates nothing.
    """
    num_tiles = triton.cdiv(len(x), FEW_ROWS if len(x) <= FEW_ROWS else MANY_ROWS)
    _launch(x, matrix, out, bias, None, num_tiles, is_few=len(x) <= FEW_ROWS, adds=adds)


def grouped_encoded(
    x: torch.Tensor,
    counts: Sequence[int],
    matrices: Sequence[EncodedMatrix],
    out: torch.Tensor,
    biases: Sequence[torch.Tensor] | None = None,
) -> None:
    """See ``profiles.kernels.grouped_encoded``, for columns in the order of the inputs.

    This allocates a table of the tiles and nothing else. Groups without rows have no tile.
    """
    first = matrices[0]
    assert all(m.encoding == first.encoding and m.rows.shape == first.rows.shape for m in matrices)
    assert all(m.rows.stride() == first.rows.stride() for m in matrices)
    assert all(bias.dtype == x.dtype and bias.stride(0) == 1 for bias in biases or ())
    is_few = len(x) <= FEW_ROWS * sum(count > 0 for count in counts)
    tiles = _tiles(counts, matrices, biases, FEW_ROWS if is_few else MANY_ROWS)
    if tiles:
        # From pinned memory, because a copy from pageable memory waits for the GPU.
        table = torch.tensor(tiles, dtype=torch.int64, pin_memory=x.is_cuda)
        table = table.to(x.device, non_blocking=True)
        bias = biases[0] if biases else None
        _launch(x, first, out, bias, table, len(tiles), is_few=is_few, adds=False)


def _tiles(
    counts: Sequence[int],
    matrices: Sequence[EncodedMatrix],
    biases: Sequence[torch.Tensor] | None,
    rows: int,
) -> list[tuple[int, ...]]:
    """Return for each tile of rows: the addresses of its matrix, table and bias (0 for none), the
    number of the matrix's first row, the tile's first row, and the end of its group's rows."""
    tiles: list[tuple[int, ...]] = []
    end = 0
    for group, (count, matrix) in enumerate(zip(counts, matrices, strict=True)):
        first, end = end, end + count
        table = 0 if matrix.table is None else matrix.table.data_ptr()
        bias = biases[group].data_ptr() if biases else 0
        shared = (matrix.rows.data_ptr(), table, bias, matrix.first_row)
        tiles += [(*shared, start, end) for start in range(first, end, rows)]
    return tiles


def _launch(
    x: torch.Tensor,
    matrix: EncodedMatrix,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: torch.Tensor | None,
    num_tiles: int,
    *,
    is_few: bool,
    adds: bool,
) -> None:
    """Multiply each tile: of rows by one matrix, or as ``tiles`` says."""
    num_outputs, x = len(matrix.rows), x if x.stride(1) == 1 else x.contiguous()
    assert x.dtype == out.dtype and out.shape == (len(x), num_outputs)
    assert out.stride(1) == 1 and x.shape[1] == matrix.num_elements
    assert bias is None or (bias.dtype == x.dtype and bias.stride(0) == 1)
    outputs = FEW_OUTPUTS if is_few else MANY_OUTPUTS
    _multiply[(triton.cdiv(num_outputs, outputs), num_tiles)](
        x,
        matrix.rows,
        matrix.table,
        bias,
        tiles,
        out,
        len(x),
        num_outputs,
        matrix.first_row,
        x.stride(0),
        matrix.rows.stride(0),
        out.stride(0),
        *sizes_of(matrix),
        **constants_of(matrix.encoding),
        HAS_BIAS=bias is not None,
        HAS_TILES=tiles is not None,
        ADDS=adds,
        TILE_ROWS=FEW_ROWS if is_few else MANY_ROWS,
        TILE_OUTPUTS=outputs,
        UNITS=DEPTH_BYTES // x.element_size() // NIBBLE_RUN,
        # Bytes cannot be fetched ahead; what can be would fill all of the shared memory.
        num_stages=1,
    )


# Arguments that change from call to call must not trigger a new compilation.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_outputs",
        "first_row",
        "x_stride",
        "row_stride",
        "out_stride",
        "dim",
        "code_bytes",
        "num_groups",
        "tile_scales",
    ],
    do_not_specialize_on_alignment=["x", "matrix", "table", "bias", "tiles", "out"],
)
def _multiply(
    x,
    matrix,
    table,
    bias,
    tiles,
    out,
    num_rows,
    num_outputs,
    first_row,
    x_stride,
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
    HAS_BIAS: tl.constexpr,
    HAS_TILES: tl.constexpr,
    ADDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    first, end = tl.program_id(1) * TILE_ROWS, num_rows
    if HAS_TILES:
        tile = tiles + 6 * tl.program_id(1)
        matrix = tl.load(tile).to(tl.pointer_type(tl.uint8))
        table = tl.load(tile + 1).to(tl.pointer_type(tl.float32))
        bias = tl.load(tile + 2).to(tl.pointer_type(x.dtype.element_ty))
        first_row, first, end = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    row = first + tl.arange(0, TILE_ROWS)[:, None]
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    # Beyond the last output and the last unit, these are read again.
    weight_row = tl.minimum(output, num_outputs - 1).to(tl.int64)[None, None, :]
    rows, index = matrix + weight_row * row_stride, first_row + weight_row
    place = tl.arange(0, HALF_UNIT)[None, :, None]
    # The inputs of first halves, in the order in which units and places make one dimension.
    i = tl.arange(0, UNITS * HALF_UNIT)
    i = (i // HALF_UNIT * UNIT + i % HALF_UNIT)[None, :]
    total = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for start in range(0, dim, UNITS * UNIT):
        unit = start // UNIT + tl.arange(0, UNITS)[:, None, None]
        first_half, second_half = elements(
            rows,
            index,
            tl.minimum(unit, (dim - 1) // UNIT),
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
        for half in tl.static_range(2):
            weights = first_half if half == 0 else second_half
            # Zero times what is behind the end of a row must be zero.
            is_inside = unit * UNIT + half * HALF_UNIT + place < dim
            weights = tl.where(is_inside, weights, 0.0).to(x.dtype.element_ty)
            weights = tl.reshape(weights, [UNITS * HALF_UNIT, TILE_OUTPUTS])
            col = start + half * HALF_UNIT + i
            values = tl.load(x + row * x_stride + col, mask=(row < end) & (col < dim), other=0.0)
            total = tl.dot(values, weights, total, input_precision="ieee")
    output = output[None, :]
    mask = (row < end) & (output < num_outputs)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    target = out + row * out_stride + output
    if ADDS:
        result += tl.load(target, mask=mask, other=0.0)
    tl.store(target, result, mask=mask)
