"""Products with plain or packed matrices: a group of them in one launch, or few rows with one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from profiles.kernels.gpu.groups import unpack_codes
from profiles.packing import GPU_DIRECT_ROWS, Packing

# Rows, outputs and warps of a tile, for groups of few rows and for larger ones; its bytes of
# inputs.
FEW_ROWS, FEW_OUTPUTS, FEW_WARPS = GPU_DIRECT_ROWS, 64, 4
MANY_ROWS, MANY_OUTPUTS, MANY_WARPS = 64, 128, 8
# Outputs of a tile of one matrix: there must be work for many processors.
LONE_OUTPUTS = 32
DEPTH_BYTES, NUM_STAGES = 128, 4
# Matrices at a multiple of this address are read in whole vectors.
VECTOR_BYTES = 16


def grouped_linear(
    x: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    packing: Packing | None,
    out: torch.Tensor,
) -> None:
    """See ``profiles.kernels.grouped_linear``: allocates a table of the tiles and nothing else.

    Groups without rows have no tile.
    """
    is_few = len(x) <= FEW_ROWS * sum(count > 0 for count in counts)
    tiles = _tiles(counts, weights, FEW_ROWS if is_few else MANY_ROWS)
    if not tiles:
        return
    # From pinned memory, because a copy from pageable memory waits for the GPU.
    table = torch.tensor(tiles, dtype=torch.int64, pin_memory=x.is_cuda)
    _launch(
        x,
        weights[0],
        packing,
        out,
        tiles=table.to(x.device, non_blocking=True),
        num_tiles=len(tiles),
        is_aligned=not any(address % VECTOR_BYTES for address, _, _ in tiles),
        is_few=is_few,
    )


def multiply_rows(
    x: torch.Tensor,
    packed: torch.Tensor,
    packing: Packing,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    adds: bool = False,
) -> None:
    """See ``profiles.kernels.multiply_rows``: each tile of few rows unpacks the matrix for itself.

    This allocates nothing, where rows are adjacent in their last dimension.
    """
    assert bias is None or (bias.dtype == x.dtype and bias.stride(0) == 1)
    _launch(
        x if x.stride(1) == 1 else x.contiguous(),
        packed,
        packing,
        out,
        bias=bias,
        num_tiles=triton.cdiv(len(x), FEW_ROWS),
        is_aligned=packed.data_ptr() % VECTOR_BYTES == 0,
        is_few=True,
        adds=adds,
    )


def _launch(
    x: torch.Tensor,
    matrix: torch.Tensor,
    packing: Packing | None,
    out: torch.Tensor,
    *,
    num_tiles: int,
    is_aligned: bool,
    is_few: bool,
    tiles: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    adds: bool = False,
) -> None:
    """Multiply each tile of rows: by one matrix, or by that which ``tiles`` names."""
    dim = x.shape[1]
    assert x.stride(1) == out.stride(1) == matrix.stride(1) == 1 and x.dtype == out.dtype
    outputs = FEW_OUTPUTS if is_few else MANY_OUTPUTS
    outputs = LONE_OUTPUTS if tiles is None else outputs
    _multiply[(triton.cdiv(len(matrix), outputs), num_tiles)](
        x,
        matrix,
        tiles,
        bias,
        out,
        len(x),
        len(matrix),
        dim,
        x.stride(0),
        matrix.stride(0),
        out.stride(0),
        packing.code_bytes if packing else 0,
        BITS=packing.bits if packing else 0,
        GROUP=packing.group_size if packing else 1,
        IS_WHOLE=packing is None or dim % packing.group_size == 0,
        ALIGNMENT=VECTOR_BYTES if is_aligned else 1,
        HAS_TILES=tiles is not None,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        TILE_ROWS=FEW_ROWS if is_few else MANY_ROWS,
        TILE_OUTPUTS=outputs,
        DEPTH=DEPTH_BYTES // x.element_size(),
        num_warps=FEW_WARPS if is_few else MANY_WARPS,
        num_stages=NUM_STAGES,
    )


def _tiles(
    counts: Sequence[int], weights: Sequence[torch.Tensor], rows: int
) -> list[tuple[int, int, int]]:
    """Return for each tile of rows: the address of its matrix, its first row, and the end of its
    group's rows."""
    tiles, first = [], 0
    for count, weight in zip(counts, weights, strict=True):
        end = first + count
        tiles += [(weight.data_ptr(), start, end) for start in range(first, end, rows)]
        first = end
    return tiles


# Arguments that change from call to call must not trigger a new compilation.
@triton.jit(
    do_not_specialize=["num_rows", "num_outputs", "out_stride"],
    do_not_specialize_on_alignment=["matrix", "tiles", "bias"],
)
def _multiply(
    x,
    matrix,
    tiles,
    bias,
    out,
    num_rows,
    num_outputs,
    dim,
    x_stride,
    weight_stride,
    out_stride,
    code_bytes,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HAS_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first, end = tl.program_id(1) * TILE_ROWS, num_rows
    if HAS_TILES:
        tile = tiles + 3 * tl.program_id(1)
        matrix = tl.load(tile).to(matrix.dtype)
        first, end = tl.load(tile + 1), tl.load(tile + 2)
    row = first + tl.arange(0, TILE_ROWS)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    is_row, is_output = (row < end)[:, None], (output < num_outputs)[None, :]
    sources = x + row[:, None] * x_stride
    offsets = output.to(tl.int64)[None, :] * weight_stride
    total = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    if BITS == 0:
        matrix = tl.multiple_of(matrix, ALIGNMENT) + offsets
        for start in range(0, dim, DEPTH):
            i = start + tl.arange(0, DEPTH)
            values = tl.load(sources + i[None, :], mask=is_row & (i < dim)[None, :], other=0.0)
            weights = tl.load(matrix + i[:, None], mask=is_output & (i < dim)[:, None], other=0.0)
            total = tl.dot(values, weights, total, input_precision="ieee")
    else:
        matrix = tl.multiple_of(matrix, ALIGNMENT) + offsets
        # A byte of codes is one element, or two: one of each half of a group. A large group is
        # multiplied in pieces.
        GROUP_CODES: tl.constexpr = GROUP * BITS // 8
        PIECE: tl.constexpr = min(GROUP_CODES, DEPTH)
        PIECES: tl.constexpr = GROUP_CODES // PIECE
        for piece in range(tl.cdiv(dim, GROUP) * PIECES):
            g, i = piece // PIECES, piece % PIECES * PIECE + tl.arange(0, PIECE)
            count = GROUP
            if not IS_WHOLE:
                count = tl.minimum(GROUP, dim - g * GROUP)
            num_codes = (count * BITS + 7) // 8
            is_code = i < num_codes
            place = matrix + (g * GROUP_CODES + i)[:, None]
            codes = tl.load(place, mask=is_output & is_code[:, None], other=0)
            # Scale and minimum in one word of 4 bytes, bfloat16 each.
            shared = (matrix + code_bytes + 4 * g).to(tl.pointer_type(tl.int32))
            both = tl.load(shared, mask=is_output, other=0)
            source = sources + (g * GROUP + i)[None, :]
            values = tl.load(source, mask=is_row & is_code[None, :], other=0.0)
            if BITS == 4:
                weights = unpack_codes(codes & 15, both).to(values.dtype)
                total = tl.dot(values, weights, total, input_precision="ieee")
                is_high = (i < count - num_codes)[None, :]
                values = tl.load(source + num_codes, mask=is_row & is_high, other=0.0)
                codes = codes >> 4
            weights = unpack_codes(codes, both).to(values.dtype)
            total = tl.dot(values, weights, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[
            None, :
        ]
    result = total.to(out.dtype.element_ty)
    target = out + row[:, None] * out_stride + output[None, :]
    if ADDS:
        result += tl.load(target, mask=is_row & is_output, other=0.0)
    tl.store(target, result, mask=is_row & is_output)
