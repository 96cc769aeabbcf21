"""On a CPU a prompt is attended as it is alone, whatever is beside it in its batch."""

from __future__ import annotations

import pytest
import torch

from costmodel.model.attention_spec import AttentionSpec, LatentSpec
from costmodel.model.rotary_spec import RotarySpec
from executor.model.latent_attention import prefill_latents
from executor.model.prefill_attention import prefill_attention
from executor.model.projections import attend_part, attend_prompt
from profiles.kernels import KeyRun

LENGTHS = [37, 1, 200, 130]
DTYPES = [torch.float32, torch.bfloat16]


def _latent_spec() -> AttentionSpec:
    return AttentionSpec(
        num_heads=6,
        num_kv_heads=1,
        head_dim=40,
        rotary=RotarySpec(theta=1e4, dim=8),
        scale=0.2,
        latent=LatentSpec(rank=32, nope_dim=16, rope_dim=8, value_dim=24),
    )


def _noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (48, None), (None, 30.0)])
def test_neither_padding_nor_neighbours_change_a_prompt(
    dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, window=window, soft_cap=soft_cap)
    q = _noise(len(LENGTHS), 250, 4, 32, dtype=dtype)
    k, v = (_noise(len(LENGTHS), 250, 2, 32, dtype=dtype) + shift for shift in (0, 1))
    found = prefill_attention(q, k, v, spec, lengths=LENGTHS)
    for i, length in enumerate(LENGTHS):
        own = slice(i, i + 1)
        alone = prefill_attention(q[own, :length], k[own, :length], v[own, :length], spec)
        assert torch.equal(found[i, :length], alone[0])
        assert not found[i, length:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_padding_nor_neighbours_change_a_prompt_of_latents(dtype: torch.dtype) -> None:
    spec = _latent_spec()
    queries = _noise(len(LENGTHS), 250, 6, 24, dtype=dtype)
    rows = _noise(len(LENGTHS), 250, 40, dtype=dtype)
    weights = {"kv_b.weight": [_noise(6 * 40, 32, dtype=dtype)]}
    found = prefill_latents(queries, rows, weights, spec, LENGTHS)
    for i, length in enumerate(LENGTHS):
        own = slice(i, i + 1)
        alone = prefill_latents(queries[own, :length], rows[own, :length], weights, spec)
        assert torch.equal(found[i, :length], alone[0])
        assert not found[i, length:].any()


def _paged(vectors: torch.Tensor, tokens: int) -> KeyRun:
    """Return the first tokens of [vectors, all tokens, heads, head_dim] in pages out of order."""
    pages = vectors[:, :tokens].unflatten(1, (-1, 32)).permute(1, 3, 0, 2, 4)
    order = torch.randperm(len(pages))
    return KeyRun.of_pages(pages[order].contiguous(), order.argsort().int(), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [32, 96])
def test_behind_a_prefix_in_pages_a_prompt_has_the_same_bits(
    dtype: torch.dtype, length: int
) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, window=70)
    queries = _noise(150, 4, 32, dtype=dtype)
    vectors = _noise(2, 150, 2, 32, dtype=dtype)
    whole = attend_prompt(queries[None], (vectors[:1], vectors[1:]), {}, spec)[0]
    for end in (120, 150):
        runs = [_paged(vectors, length), KeyRun.of(*vectors[:, length:end])]
        found = attend_part(queries[length:end], runs, {}, spec, first_position=length, first_key=0)
        assert torch.equal(found, whole[length:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_behind_a_prefix_of_latents_a_prompt_has_the_same_bits(dtype: torch.dtype) -> None:
    spec = _latent_spec()
    queries, rows = _noise(150, 6, 24, dtype=dtype), _noise(1, 150, 1, 40, dtype=dtype)
    weights = {"kv_b.weight": [_noise(6 * 40, 32, dtype=dtype)]}
    whole = attend_prompt(queries[None], (rows,), weights, spec)[0]
    for end in (100, 150):
        own = rows[0, 64:end]
        runs = [_paged(rows, 64), KeyRun.of(own, own)]
        found = attend_part(queries[64:end], runs, weights, spec, first_position=64, first_key=0)
        assert torch.equal(found, whole[64:end])
