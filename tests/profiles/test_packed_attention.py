"""Attention over a packed cache, and over the keys with the largest scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from profiles import kernels
from profiles.kernels import twins
from profiles.packing import BITS, GROUP_SIZES, Packing
from tests.covering import covering

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
# Batch, key heads, group, head_dim, tokens.
SHAPES = [(3, 2, 4, 128, 37), (5, 1, 1, 64, 16), (2, 3, 8, 80, 50), (4, 2, 3, 16, 7)]


def _queries(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    batch, kv_heads, group, head_dim, _ = shape
    return torch.randn(batch, kv_heads * group, head_dim).to(dtype)


def _cache(shape: tuple[int, ...], dtype: torch.dtype, packing: Packing | None) -> torch.Tensor:
    """Make a cache [tokens, 2, rows, ...] that lies row by row, with room for more tokens."""
    batch, kv_heads, _, head_dim, tokens = shape
    by_row = torch.randn(batch * kv_heads, 2, tokens + 3, head_dim).to(dtype)
    if packing is not None:
        plain = by_row.flatten(0, 1)
        packed = torch.empty(*plain.shape[:2], packing.row_bytes, dtype=torch.uint8)
        kernels.pack_rows(plain, packing, packed)
        by_row = packed.unflatten(0, by_row.shape[:2])
    return by_row[:, :, :tokens].permute(2, 1, 0, 3)


def _unpacked(context: torch.Tensor, packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    tokens, _, rows, _ = context.shape
    whole = torch.empty(tokens, 2, rows, packing.num_elements, dtype=dtype)
    for token in range(tokens):
        kernels.unpack_rows(context[token], packing, whole[token])
    return whole


def _void(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of the void slots of each sequence, up to the last but one, and which slots
    they are."""
    lengths = torch.randint(1, tokens, (batch,), dtype=torch.int32)
    slots = torch.arange(tokens)
    void_slots = torch.stack([lengths, torch.full_like(lengths, tokens - 1)], dim=1)
    return void_slots, (slots >= lengths[:, None]) & (slots < tokens - 1)


def _sinks(q: torch.Tensor, has_sinks: bool) -> torch.Tensor | None:
    return torch.randn(q.shape[1]) if has_sinks else None


@covering(
    {
        "dtype": DTYPES,
        "shape": SHAPES,
        "bits": BITS,
        "group_size": GROUP_SIZES,
        "sparsity": [1.0, 0.3],
        "soft_cap, has_sinks": [(None, False), (5.0, True)],
    }
)
def test_a_packed_cache_is_attended_as_if_it_had_been_unpacked(
    library: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    sparsity: float,
    soft_cap: float | None,
    has_sinks: bool,
) -> None:
    batch, kv_heads, group, head_dim, tokens = shape
    packing = Packing(num_elements=head_dim, bits=bits, group_size=group_size)
    q, context = _queries(shape, dtype), _cache(shape, dtype, packing)
    void_slots, _ = _void(batch, tokens)
    sinks = _sinks(q, has_sinks)
    out = torch.full((batch * kv_heads - 1, group, head_dim), torch.nan, dtype=dtype)
    expected = out.clone()
    for into, cache, how in (
        (out, context, packing),
        (expected, _unpacked(context, packing, dtype), None),
    ):
        kernels.decode_attention(
            q,
            cache[:, :, 1:],
            into,
            first_row=1,
            void_slots=void_slots,
            soft_cap=soft_cap,
            sinks=sinks,
            packing=how,
            sparsity=sparsity,
        )
    # Natively the arithmetic is the same, and differs at most in what is fused.
    tolerance = TOLERANCE[dtype] if library == "twin" else torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sparsity", [1.0, 0.3])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(None, False), (5.0, False), (None, True)])
def test_the_twin_takes_rows_in_parts(
    bits: int | None,
    sparsity: float,
    soft_cap: float | None,
    has_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (3, 2, 4, 64, 37)
    packing = Packing(num_elements=64, bits=bits) if bits else None
    q, context = _queries(shape, torch.float32), _cache(shape, torch.float32, packing)
    void_slots, _ = _void(3, 37)
    whole, parts = (torch.empty(6, 4, 64) for _ in range(2))
    how: dict[str, Any] = {
        "first_row": 0,
        "void_slots": void_slots,
        "scale": 0.125,
        "soft_cap": soft_cap,
        "sinks": _sinks(q, has_sinks),
        "slopes": None,
        "packing": packing,
        "sparsity": sparsity,
    }
    twins.decode_attention(q, context, whole, **how)
    monkeypatch.setattr(twins, "UNPACKED_AT_ONCE_BYTES", 1)
    twins.decode_attention(q, context, parts, **how)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def _attend_sparsely(
    q: torch.Tensor,
    context: torch.Tensor,
    void: torch.Tensor,
    sparsity: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend query by query in float64, to the best keys of those that are not void; the mean of
    all values stands for the others."""
    kv_heads = context.shape[2] // len(q)
    group = q.shape[1] // kv_heads
    out = torch.empty(context.shape[2], group, q.shape[2], dtype=torch.float64)
    for row in range(context.shape[2]):
        sequence, head = divmod(row, kv_heads)
        keys, values = context[~void[sequence], :, row].double().unbind(1)
        for g in range(group):
            scores = keys @ q[sequence, head * group + g].double() / math.sqrt(q.shape[2])
            best = scores.argsort(descending=True)[: math.ceil(len(keys) * sparsity)]
            whole = scores
            if sinks is not None:
                whole = torch.cat([scores, sinks[head * group + g, None].double()])
            shares = whole.softmax(-1)[: len(keys)]
            dropped = shares.sum() - shares[best].sum()
            out[row, g] = shares[best] @ values[best] + dropped * values.mean(0)
    return out


@covering(
    {
        "dtype": DTYPES,
        "shape": SHAPES,
        "sparsity": [0.01, 0.1, 0.5, 0.999],
        "has_sinks": [False, True],
    }
)
def test_sparse_attention_takes_the_keys_with_the_largest_scores(
    library: str, shape: tuple[int, ...], dtype: torch.dtype, sparsity: float, has_sinks: bool
) -> None:
    batch, kv_heads, group, head_dim, tokens = shape
    q, context = _queries(shape, dtype), _cache(shape, dtype, None)
    void_slots, void = _void(batch, tokens)
    sinks = _sinks(q, has_sinks)
    out = torch.empty(batch * kv_heads, group, head_dim, dtype=dtype)
    kernels.decode_attention(q, context, out, void_slots=void_slots, sinks=sinks, sparsity=sparsity)
    expected = _attend_sparsely(q, context, void, sparsity, sinks)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_sums_of_values_kept_from_step_to_step_do_not_change_what_is_attended(
    library: str, shape: tuple[int, ...], bits: int | None
) -> None:
    batch, kv_heads, group, head_dim, tokens = shape
    packing = Packing(num_elements=head_dim, bits=bits, group_size=32) if bits else None
    q, context = _queries(shape, torch.float32), _cache(shape, torch.float32, packing)
    void_slots, _ = _void(batch, tokens)
    kept, anew = (torch.empty(batch * kv_heads, group, head_dim) for _ in range(2))
    sums = torch.full((batch * kv_heads, head_dim), torch.nan)
    first = max(1, tokens - 1)
    for end in range(first, tokens + 1):
        arguments: dict[str, Any] = {
            "void_slots": void_slots,
            "packing": packing,
            "sparsity": 0.2,
        }
        kernels.decode_attention(q, context[:end], anew, **arguments)
        kernels.decode_attention(
            q,
            context[:end],
            kept,
            **arguments,
            value_sums=sums,
            begins=end == first,
        )
        torch.testing.assert_close(kept, anew, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_ten_slots_a_tenth_is_one(library: str, dtype: torch.dtype) -> None:
    """The share is rounded up, but not because a product is a hair above a whole number."""
    shape = (1, 1, 1, 16, 10)
    q, context = _queries(shape, dtype), _cache(shape, dtype, None)
    out = torch.empty(1, 1, 16, dtype=dtype)
    kernels.decode_attention(q, context, out, sparsity=0.1)
    shares = (context[:, 0, 0].double() @ q[0, 0].double() / 4).softmax(-1)
    values = context[:, 1, 0].double()
    expected = shares.max() * values[shares.argmax()] + (1 - shares.max()) * values.mean(0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[0, 0].double(), expected, rtol=tolerance, atol=tolerance)
