"""Decode attention over rows that are key and value at once, by brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch

from profiles import kernels
from profiles.kernels import attention
from profiles.packing import Packing
from tests.covering import covering
from tests.profiles.test_kernels import TOLERANCE

# Batch, heads, elements of a row and of its value, tokens: heads in one part and in several, whole
# vectors and parts, whole tiles and parts.
SHAPES = [
    (3, 4, 36, 28, 37),
    (2, 16, 576, 512, 20),
    (2, 128, 576, 512, 33),
    (3, 40, 288, 256, 5),
    (2, 34, 64, 40, 50),
    (4, 20, 72, 64, 16),
]


@covering(
    {
        "dtype": list(TOLERANCE),
        "shape": SHAPES,
        "bits": [None, 8, 4],
        "sparsity": [1.0, 0.3],
        "by_row": [False, True],
    }
)
def test_decode_attention(
    library: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    bits: int | None,
    sparsity: float,
    by_row: bool,
) -> None:
    """Of all rows but the first, with a void behind each prompt."""
    batch, heads, dim, value_dim, tokens = shape
    packing = Packing(num_elements=dim, bits=bits, group_size=32) if bits else None
    # Behind the queries of a sequence is its new row.
    q = torch.randn(batch, heads + 1, dim).to(dtype)[:, :heads]
    plain = torch.randn(tokens, batch, dim).to(dtype)
    context = stored = plain[:, None, 1:]
    if packing is not None:
        packed = torch.empty(tokens, batch, packing.row_bytes, dtype=torch.uint8)
        kernels.pack_rows(plain, packing, packed)
        kernels.unpack_rows(packed, packing, plain)
        stored = packed[:, None, 1:]
    if by_row:
        stored = stored.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    prompt_len = tokens - 2
    lengths = torch.randint(1, prompt_len + 1, (batch,), dtype=torch.int32)
    void_slots = torch.stack([lengths, torch.full_like(lengths, prompt_len)], dim=1)
    out = torch.full((batch - 1, heads, value_dim), torch.nan, dtype=dtype)
    kernels.decode_attention(
        q,
        stored,
        out,
        first_row=1,
        void_slots=void_slots,
        scale=0.07,
        packing=packing,
        sparsity=sparsity,
    )
    for row in range(batch - 1):
        slots = torch.arange(tokens)
        seen = (slots < lengths[row + 1]) | (slots >= prompt_len)
        rows = context[seen, 0, row].double()
        scores = q[row + 1].double() @ rows.T * 0.07
        shares = scores.softmax(-1)
        if sparsity < 1:
            kept = math.ceil(len(rows) * sparsity - 1e-9)
            least = scores.sort(-1, descending=True).values[:, kept - 1 : kept]
            large = shares.masked_fill(scores < least, 0)
            shares = large + (1 - large.sum(-1, keepdim=True)) / len(rows)
        # Sums of float32 are of more elements here.
        tolerance = max(1e-5, TOLERANCE[dtype])
        torch.testing.assert_close(
            out[row].double(), shares @ rows[:, :value_dim], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("group", [1, 4, 16, 17, 20, 32, 40, 64, 128])
def test_parts_of_a_group_are_equal_and_not_small(group: int) -> None:
    parts = attention.head_splits_of(group)  # what the kernel is called with
    assert group % parts == 0
    assert parts == 1 or group // parts >= attention.QUERIES_AT_ONCE
