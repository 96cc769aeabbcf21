"""Attention of decode with ALiBi, against plain arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch

from profiles import kernels
from profiles.kernels import twins
from profiles.packing import UNPACKED_AT_ONCE_BYTES, Packing
from tests.covering import covering

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
# Batch, key heads, group, head_dim, tokens: several tiles and a part, one query and many.
SHAPES = [(3, 2, 4, 128, 37), (5, 1, 1, 64, 16), (2, 3, 8, 80, 50), (4, 2, 3, 16, 7)]


def _attend_slowly(
    q: torch.Tensor,
    context: torch.Tensor,
    void: torch.Tensor,
    slopes: torch.Tensor,
    first_row: int,
    sparsity: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """Attend query by query; ``void`` is bool [batch, tokens].

    The keys that are there are numbered, and the last one is the query's own.
    """
    kv_heads = slopes.shape[0]
    group = q.shape[1] // kv_heads
    out = torch.empty(context.shape[2], group, q.shape[2], dtype=torch.float64)
    for row in range(context.shape[2]):
        sequence, head = divmod(row + first_row, kv_heads)
        keys, values = context[~void[sequence], :, row].double().unbind(1)
        distances = torch.arange(len(keys), 0, -1) - 1
        for g in range(group):
            scores = keys @ q[sequence, head * group + g].double() / math.sqrt(q.shape[2])
            if soft_cap is not None:
                scores = soft_cap * (scores / soft_cap).tanh()
            scores -= slopes[head, g].double() * distances
            shares = scores.softmax(0)
            best = scores.argsort(descending=True)[: math.ceil(len(keys) * sparsity)]
            dropped = shares.sum() - shares[best].sum()
            out[row, g] = shares[best] @ values[best] + dropped * values.mean(0)
    return out


@covering(
    {
        "dtype": DTYPES,
        "shape": SHAPES,
        "bits": [None, 4, 8],
        "sparsity": [1.0, 0.3],
        "is_padded": [False, True],
        "soft_cap": [None, 3.0],
    }
)
def test_scores_fall_with_the_distance(
    library: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bits: int | None,
    sparsity: float,
    is_padded: bool,
    soft_cap: float | None,
) -> None:
    """The distance counts the tokens that are there: void slots make it no longer."""
    batch, kv_heads, group, head_dim, tokens = shape
    q = torch.randn(batch, kv_heads * group, head_dim).to(dtype)
    context = torch.randn(tokens, 2, batch * kv_heads, head_dim).to(dtype)
    packing, packed = None, context
    if bits is not None:
        packing = Packing(num_elements=head_dim, bits=bits, group_size=64)
        shape_at_rest = tokens * 2, batch * kv_heads, packing.row_bytes
        packed = torch.empty(shape_at_rest, dtype=torch.uint8)
        kernels.pack_rows(context.flatten(0, 1), packing, packed)
        unpacked = torch.empty_like(context.flatten(0, 1))
        kernels.unpack_rows(packed, packing, unpacked)
        context, packed = unpacked.view(context.shape), packed.unflatten(0, (tokens, 2))
    lengths = torch.randint(1, tokens, (batch,), dtype=torch.int32)
    ends = torch.full_like(lengths, tokens - 1) if is_padded else lengths
    void_slots = torch.stack([lengths, ends], dim=1)
    slots = torch.arange(tokens)
    void = (slots >= void_slots[:, :1]) & (slots < void_slots[:, 1:])
    slopes = torch.rand(kv_heads, group) * 2
    out = torch.full((batch * kv_heads - 1, group, head_dim), torch.nan, dtype=dtype)
    kernels.decode_attention(
        q,
        packed[:, :, 1:],
        out,
        first_row=1,
        void_slots=void_slots if is_padded else None,
        soft_cap=soft_cap,
        slopes=slopes.flatten(),
        packing=packing,
        sparsity=sparsity,
    )
    expected = _attend_slowly(q, context[:, :, 1:], void, slopes, 1, sparsity, soft_cap)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_twin_takes_rows_in_parts(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, slopes = torch.randn(3, 8, 64), torch.rand(8)
    packing = Packing(num_elements=64, bits=bits) if bits else None
    context = torch.randn(37, 2, 6, 64)
    if packing is not None:
        packed = torch.empty(74, 6, packing.row_bytes, dtype=torch.uint8)
        kernels.pack_rows(context.flatten(0, 1), packing, packed)
        context = packed.unflatten(0, (37, 2))
    whole, parts = torch.empty(6, 4, 64), torch.empty(6, 4, 64)
    void_slots = torch.tensor([[3, 30], [1, 30], [30, 30]], dtype=torch.int32)
    for out, num_bytes in ((whole, UNPACKED_AT_ONCE_BYTES), (parts, 1)):
        monkeypatch.setattr(twins, "UNPACKED_AT_ONCE_BYTES", num_bytes)
        twins.decode_attention(
            q,
            context,
            out,
            first_row=0,
            void_slots=void_slots,
            scale=64**-0.5,
            soft_cap=None,
            sinks=None,
            slopes=slopes,
            packing=packing,
            sparsity=1.0,
        )
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
