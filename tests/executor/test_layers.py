"""Logits and tokens against transformers, which shares no code with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.rotary_spec import RotarySpec
from executor.checkpoint.folder import Checkpoint
from executor.model.layers import feed_forward, finish_attention
from executor.model.matrices import linear, split_rows
from executor.model.prefill_attention import prefill_attention
from executor.model.projections import project_qkv, split_heads
from executor.model.rotations import rotary_frequencies, rotation_of
from tests.executor.reference import ReferenceModel, gather_rows
from tests.executor.tiny_keys import LLAMA3_ROPE
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

CASES: dict[str, dict[str, Any]] = {
    "opt": {"family": "opt", "tied": True},
    "opt-untied-gelu": {"family": "opt", "tied": False, "activation_function": "gelu"},
    "opt-without-bias": {"family": "opt", "tied": True, "enable_bias": False},
    "llama": {"family": "llama", "num_kv_heads": 4},
    "llama-tied": {"family": "llama", "num_kv_heads": 1, "tied": True, "num_layers": 3},
    "llama3-rope": {"family": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-linear-rope": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0},
    },
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral-wide-heads": {"family": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "num_kv_heads": 1},
    "qwen3-biases": {"family": "qwen3", "attention_bias": True},
    "qwen3-tied-wide-heads": {"family": "qwen3", "head_dim": 32, "tied": True},
}
PROMPTS = [[5, 9, 170, 3, 3, 77, 12], [1, 2], [88] * 11, [33]]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save_tiny_model(tmp_path, **CASES[case])
    ours = ReferenceModel(Checkpoint.open(tmp_path))
    ids = torch.randint(0, VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    got = ours.logits(ids.tolist())
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", ["opt", "qwen2", "qwen3"])
@pytest.mark.parametrize("cut", [0.1, 0.35, 0.6, 0.9])
def test_cuts_between_rows_change_nothing(case: str, cut: float, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, **CASES[case])
    checkpoint = Checkpoint.open(tmp_path)
    whole = ReferenceModel(checkpoint).logits(PROMPTS[0])
    parts = ReferenceModel(checkpoint, cut=cut).logits(PROMPTS[0])
    # Float32 kernels may add up the last few columns of a product in another order.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_generation_ends_with_the_end_token(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    model = ReferenceModel(Checkpoint.open(tmp_path))
    (full,) = model.generate([[5, 6, 7]], 8)
    (ended,) = model.generate([[5, 6, 7]], 8, frozenset({full[3]}))
    assert ended == full[: full.index(full[3]) + 1]


def test_linear_writes_every_chunk_in_its_place() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(10, 8), torch.randn(10)
    chunks = (weight[:1], weight[1:7], weight[7:])
    expected = x @ weight.T + bias
    torch.testing.assert_close(linear(x, chunks, bias), expected)
    torch.testing.assert_close(linear(x, chunks), expected - bias)
    assert linear(x, chunks).is_contiguous()


@pytest.mark.parametrize("row", [0, 1, 3, 5, 10])
def test_split_rows_keeps_order_and_copies_nothing(row: int) -> None:
    weight = torch.arange(20.0).view(10, 2)
    before, behind = (
        [chunk for chunk in part if isinstance(chunk, torch.Tensor)]
        for part in split_rows((weight[:3], weight[3:]), row)
    )
    assert torch.equal(torch.cat([torch.empty(0, 2), *before]), weight[:row])
    assert torch.equal(torch.cat([torch.empty(0, 2), *behind]), weight[row:])
    assert {t.untyped_storage().data_ptr() for t in before + behind} == {
        weight.untyped_storage().data_ptr()
    }


def test_gather_rows_finds_rows_in_any_chunk() -> None:
    table = torch.randn(10, 4)
    ids = torch.tensor([[9, 0, 3], [2, 3, 3]])
    assert torch.equal(gather_rows(ids, (table[:3], table[3:])), table[ids])


def test_llama3_rope_has_its_three_regimes() -> None:
    plain = rotary_frequencies(RotarySpec(theta=5e5), 128, torch.device("cpu"))
    rope = RotarySpec(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192)
    scaled = rotary_frequencies(rope, 128, torch.device("cpu"))
    waves = 2 * torch.pi / plain
    assert torch.equal(scaled[waves < 2048], plain[waves < 2048])
    torch.testing.assert_close(scaled[waves > 8192], plain[waves > 8192] / 8)
    assert (scaled.diff() < 0).all()


def test_prefill_attention_matches_explicit_softmax() -> None:
    q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    keys, values = (t.repeat_interleave(3, dim=2).transpose(1, 2) for t in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(2, 3) / 8**0.5
    scores.masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    spec = AttentionSpec(num_heads=q.shape[2], num_kv_heads=k.shape[2], head_dim=q.shape[3])
    torch.testing.assert_close(prefill_attention(q, k, v, spec), expected)


@pytest.mark.parametrize("case", ["opt", "qwen3"])
def test_only_what_is_added_to_changes(case: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, **CASES[case])
    model = ReferenceModel(Checkpoint.open(tmp_path))
    layer, weights = model.spec.layer(0), model.decoders[0]
    attention = layer.attention
    x, rotation = torch.randn(2, 3, model.spec.hidden_size), None
    if attention.rotary is not None:
        rotation = rotation_of(torch.arange(3), attention.rotary, attention.head_dim, x.dtype)
    before = x.clone()
    qkv = project_qkv(x, weights, rotation, layer)
    attended = prefill_attention(*split_heads(qkv, attention), attention)
    assert torch.equal(x, before)
    attended_before = attended.clone()
    finish_attention(x, attended, weights, layer)
    feed_forward(x, weights, layer)
    assert torch.equal(attended, attended_before)
    assert not torch.equal(x, before)
