"""Attention in chunks: slots of a ring by brute force, kernels with a void that wraps around."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costmodel.model.attention_spec import AttentionSpec
from executor.model.prefill_attention import attend_on_gpu, prefill_attention
from executor.stores.cache_layout import CacheLayout
from profiles import kernels
from profiles.kernels import twins


def _ring(size: int) -> CacheLayout:
    return CacheLayout(
        rows_per_sequence=1,
        head_dim=4,
        num_slots=size,
        prompt_slots=size,
        is_ring=True,
        segments=(),
        packing=None,
        dtype=torch.float32,
        is_chunked=True,
    )


@given(data=st.data())
def test_the_slots_that_are_not_void_are_those_of_the_chunk(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    prompt_len = data.draw(st.integers(1, 25))
    length = data.draw(st.integers(1, prompt_len))
    token = data.draw(st.integers(1, 25))
    ring = _ring(size)
    # The position of the token in each slot, written one after the other.
    kept = ring.kept(prompt_len)
    held = {kept - 1 - i: length - 1 - i for i in range(min(kept, length))}
    for step in range(1, token + 1):
        held[ring.new_slot(prompt_len, step)] = length + step - 1
    position = length + token - 1
    expected = {s for s, p in held.items() if position - position % size <= p <= position}
    ((first, end),) = ring.void_slots(torch.tensor([length]), prompt_len, token).tolist()
    used = range(ring.used_slots(prompt_len, token))
    wraps = first > end
    seen = {s for s in used if ((s < first and s >= end) if wraps else (s < first or s >= end))}
    assert seen == expected
    assert ring.has_void_slots(length, prompt_len, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [1.0, 0.5])
@pytest.mark.parametrize("is_twin", [False, True])
def test_a_void_may_wrap_around(
    dtype: torch.dtype, sparsity: float, is_twin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_twin:
        monkeypatch.setattr("profiles.kernels.call.load_library", lambda: None)
    torch.manual_seed(0)
    q, context = torch.randn(2, 4, 32).to(dtype), torch.randn(40, 2, 4, 32).to(dtype)
    void = torch.tensor([[30, 7], [35, 20]], dtype=torch.int32)
    out, expected = torch.empty(4, 2, 32, dtype=dtype), torch.empty(4, 2, 32, dtype=dtype)
    kernels.decode_attention(q, context, out, void_slots=void, sparsity=sparsity)
    for sequence, (end, first) in enumerate(void.tolist()):
        rows = slice(2 * sequence, 2 * sequence + 2)
        twins.decode_attention(
            q[sequence : sequence + 1],
            context[first:end, :, rows],
            expected[rows],
            first_row=0,
            void_slots=None,
            scale=32**-0.5,
            soft_cap=None,
            sinks=None,
            slopes=None,
            packing=None,
            sparsity=sparsity,
        )
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("attend", [prefill_attention, attend_on_gpu])
def test_prompts_longer_than_a_tile_attend_in_chunks(
    attend: Callable[..., torch.Tensor], has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of queries and keys do not begin with chunks."""
    monkeypatch.setattr("executor.model.prefill_attention.QUERIES_AT_ONCE", 16)
    monkeypatch.setattr("executor.model.prefill_attention.KEYS_AT_ONCE", 12)
    torch.manual_seed(0)
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=8, window=21, is_chunked=True, has_sinks=has_sinks
    )
    q, k, v = (torch.randn(1, 70, heads, 8) for heads in (4, 2, 2))
    sinks = torch.randn(4) if has_sinks else None
    got = attend(q, k, v, spec, sinks).view(70, 4, 8)
    for position in range(70):
        seen = slice(position - position % 21, position + 1)
        for head in range(4):
            scores = k[0, seen, head // 2] @ q[0, position, head] / 8**0.5
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            shares = scores.softmax(0)[: seen.stop - seen.start]
            expected = shares @ v[0, seen, head // 2]
            torch.testing.assert_close(got[position, head], expected, rtol=1e-4, atol=1e-5)
