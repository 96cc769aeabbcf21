"""Products of groups of rows, each with its own matrix, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from profiles.kernels.gpu.groups import unpack_codes
from profiles.packing import Packing

# Rows, outputs and warps of a tile, for groups of few rows and for larger ones; its bytes of
# inputs.
FEW_ROWS, FEW_OUTPUTS, FEW_WARPS = 16, 64, 4
MANY_ROWS, MANY_OUTPUTS, MANY_WARPS = 64, 128, 8
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
    matrix, (num_rows, dim) = weights[0], x.shape
    assert x.stride(1) == out.stride(1) == matrix.stride(1) == 1 and x.dtype == out.dtype
    is_few = num_rows <= FEW_ROWS * sum(count > 0 for count in counts)
    rows, outputs = (FEW_ROWS, FEW_OUTPUTS) if is_few else (MANY_ROWS, MANY_OUTPUTS)
    tiles = _tiles(counts, weights, rows)
    if not tiles:
        return
    # From pinned memory, because a copy from pageable memory waits for the GPU.
    table = torch.tensor(tiles, dtype=torch.int64, pin_memory=x.is_cuda)
    _multiply[(triton.cdiv(len(matrix), outputs), len(tiles))](
        x,
        table.to(x.device, non_blocking=True),
        out,
        len(matrix),
        dim,
        x.stride(0),
        matrix.stride(0),
        out.stride(0),
        packing.code_bytes if packing else 0,
        BITS=packing.bits if packing else 0,
        GROUP=packing.group_size if packing else 1,
        IS_WHOLE=packing is None or dim % packing.group_size == 0,
        ALIGNMENT=1 if any(address % VECTOR_BYTES for address, _, _ in tiles) else VECTOR_BYTES,
        TILE_ROWS=rows,
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


@triton.jit(do_not_specialize=["num_outputs", "out_stride"])
def _multiply(
    x,
    tiles,
    out,
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
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(1)
    address, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = first + tl.arange(0, TILE_ROWS)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    is_row, is_output = (row < end)[:, None], (output < num_outputs)[None, :]
    sources = x + row[:, None] * x_stride
    offsets = output.to(tl.int64)[None, :] * weight_stride
    total = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    if BITS == 0:
        matrix = address.to(tl.pointer_type(x.dtype.element_ty))
        matrix = tl.multiple_of(matrix, ALIGNMENT) + offsets
        for start in range(0, dim, DEPTH):
            i = start + tl.arange(0, DEPTH)
            values = tl.load(sources + i[None, :], mask=is_row & (i < dim)[None, :], other=0.0)
            weights = tl.load(matrix + i[:, None], mask=is_output & (i < dim)[:, None], other=0.0)
            total = tl.dot(values, weights, total, input_precision="ieee")
    else:
        matrix = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), ALIGNMENT) + offsets
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
    target = out + row[:, None] * out_stride + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_row & is_output)
