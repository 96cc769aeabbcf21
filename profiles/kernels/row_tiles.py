"""Products by torch whose rows do not depend on how many are multiplied together.

torch chooses a kernel by the shapes of a product, and each kernel sums in an order of its own. A
product of tiles of one shape takes one kernel. Rows of zeros fill the last tile up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from profiles.kernels.groups import unpack_rows
from profiles.packing import Packing

# The shape of a tile's result. A matrix is cut at multiples of its outputs, whichever of its rows
# are unpacked at once.
TILE_ROWS, TILE_OUTPUTS = 64, 1024

# One entry for each open context. Contexts of two models may close in the order they opened.
_open_contexts: set[object] = set()


@contextmanager
def fixed_rows() -> Iterator[None]:
    """Compute each row of a matrix product as if it were alone, in all threads of the process.

    On a CPU no result then depends on the number of rows in a product. Native kernels always sum
    so. Where torch multiplies many rows faster, it does so in tiles. On a GPU this changes nothing.
    """
    context = object()
    _open_contexts.add(context)
    try:
        yield
    finally:
        _open_contexts.discard(context)


def rows_are_fixed() -> bool:
    """Whether a ``fixed_rows`` is open."""
    return bool(_open_contexts)


def multiply_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    *,
    adds: bool,
) -> torch.Tensor:
    """Do what ``kernels.linear`` does, in tiles of equal shape.

    Temporaries: the inputs and the result of one tile, and its part of ``weight`` where that is not
    dense.
    """
    if out is None:
        out = x.new_empty(len(x), len(weight))
    tile = x.new_empty(TILE_ROWS, x.shape[1])
    for first in range(0, len(weight), TILE_OUTPUTS):
        columns = slice(first, first + TILE_OUTPUTS)
        part, own_bias = weight[columns].contiguous(), None if bias is None else bias[columns]
        for rows, to in zip(x.split(TILE_ROWS), out[:, columns].split(TILE_ROWS), strict=True):
            tile[: len(rows)] = rows
            tile[len(rows) :] = 0
            made = F.linear(tile, part, own_bias)[: len(rows)]
            if adds:
                to += made
            else:
                to.copy_(made)
    return out


def multiply_packed_tiles(
    x: torch.Tensor,
    packed: torch.Tensor,
    packing: Packing,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    adds: bool,
) -> None:
    """Do what ``kernels.multiply_rows`` does, in tiles of equal shape.

    Temporaries: those of ``multiply_tiles``, and the unpacked rows of one tile.
    """
    for first in range(0, len(packed), TILE_OUTPUTS):
        rows, columns = packed[first : first + TILE_OUTPUTS], slice(first, first + TILE_OUTPUTS)
        part = x.new_empty(len(rows), packing.num_elements)
        unpack_rows(rows[None], packing, part[None])
        own_bias = None if bias is None else bias[columns]
        multiply_tiles(x, part, own_bias, out[:, columns], adds=adds)
