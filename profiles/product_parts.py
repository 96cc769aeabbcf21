"""How a matrix product is cut into parts that cores take one after another. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

# A part is worth its cost, some 10 us, where it computes or reads so much.
LEAST_FLOP = 2**26
LEAST_BYTES = 2**22
# Parts for each thread: where a thread loses a tenth of its time to another program, the others
# take over all but one part of that.
PARTS_PER_THREAD = 8
# Operands that are converted to float32, at most so many bytes or rows of each at once.
WIDE_BYTES = 2**22
FEWEST_ROWS, MOST_ROWS = 64, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A grid of parts: rows of the inputs and rows of the weights that one part multiplies."""

    input_rows: int
    weight_rows: int


@lru_cache
def parts_of(
    num_inputs: int, out_features: int, in_features: int, *, num_threads: int, is_wide: bool
) -> Parts:
    """Cut the product of [num_inputs, in_features] and weights [out_features, in_features].

    Parameters
    ----------
    is_wide
        The parts are converted to float32, so that they must be small.
    """
    flop = 2 * num_inputs * out_features * in_features
    most = max(flop // LEAST_FLOP, 2 * out_features * in_features // LEAST_BYTES)
    count = max(1, min(most, PARTS_PER_THREAD * num_threads))
    # Whole cache lines of 16-bit results.
    weight_rows = math.ceil(out_features / count / 32) * 32
    input_rows = num_inputs
    if is_wide:
        limit = min(MOST_ROWS, max(FEWEST_ROWS, WIDE_BYTES // (4 * in_features)))
        input_rows, weight_rows = min(input_rows, limit), min(weight_rows, limit)
    return Parts(input_rows=input_rows, weight_rows=min(weight_rows, out_features))


def wide_bytes(num_inputs: int, out_features: int, in_features: int, *, num_threads: int) -> int:
    """Return the bytes of float32 that all threads together hold: operands and results."""
    parts = parts_of(num_inputs, out_features, in_features, num_threads=num_threads, is_wide=True)
    a, b = parts.input_rows, parts.weight_rows
    return num_threads * 4 * (in_features * (a + b) + a * b)
