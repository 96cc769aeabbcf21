"""On a CPU a prompt is attended as it is alone, whatever is beside it in its batch."""

from __future__ import annotations

import pytest
import torch

from costmodel.model.attention_spec import AttentionSpec, LatentSpec
from costmodel.model.rotary_spec import RotarySpec
from executor.model.latent_attention import prefill_latents
from executor.model.prefill_attention import prefill_attention

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
