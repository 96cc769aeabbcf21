"""Bytes of the copies in float32 or integers in the native matrix product. No torch."""

from __future__ import annotations

# The values of product_weights.h: rows whose inputs are converted at once, outputs and dimensions
# of the weights that a thread converts at once, and padding that keeps rows off the same lines of a
# cache.
WINDOW_ROWS = 512
TILE_OUTPUTS, TILE_DEPTH = 64, 1024
GAP = 16


def wide_bytes(num_inputs: int, in_features: int, *, num_threads: int) -> int:
    """Return the bytes of all threads beside 16-bit operands and results."""
    depth = min(TILE_DEPTH, -(-in_features // 256) * 256) + GAP
    rows = min(num_inputs, WINDOW_ROWS)
    inputs = 4 * rows * (-(-in_features // GAP) * GAP + GAP)
    # Converted weights, one unpacked row of them, and sums between two parts of the dimensions.
    tile = (4 * TILE_OUTPUTS + 2) * depth + 32 * TILE_OUTPUTS * (rows // 3 + 6)
    return inputs + num_threads * tile
