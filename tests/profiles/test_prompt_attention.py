"""Attention of prompts against a softmax in float64; no cut changes a bit of any token."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from profiles import kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
# Key heads, group, elements of a key and of a value.
SHAPES = [(2, 3, 128, 128), (1, 1, 64, 64), (3, 8, 80, 80), (4, 1, 24, 16), (1, 71, 8, 8)]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "chunks": {"window": 48, "is_chunked": True},
    "soft cap": {"soft_cap": 2.0, "scale": 0.5},
    "sinks": {"sinks": True, "window": 9},
    "alibi": {"slopes": True, "window": 100},
}
CUTS = [16, 64, 100]
pytestmark = pytest.mark.usefixtures("library")


@dataclass(kw_only=True)
class Prompt:
    """A prompt whose vectors lie among others, as the projections leave them."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    how: dict[str, Any]

    def attend(self, first: int, end: int, *runs: kernels.KeyRun, **how: Any) -> torch.Tensor:
        """Attend with some of the tokens."""
        out = self.q.new_full((end - first, self.q.shape[1], self.values.shape[2]), torch.nan)
        runs = runs or (kernels.KeyRun.of(self.keys[:end], self.values[:end]),)
        how = self.how | {"first_position": first} | how
        kernels.prompt_attention(self.q[first:end], runs, out, **how)
        return out

    @property
    def whole(self) -> torch.Tensor:
        """The result for all tokens at once."""
        return self.attend(0, len(self.q))

    def run(self, first: int, end: int) -> kernels.KeyRun:
        """A run of some of the keys."""
        return kernels.KeyRun.of(self.keys[first:end], self.values[first:end])

    def paged_run(self, first: int, end: int, *, page: int = 32) -> kernels.KeyRun:
        """The same in pages anywhere in a pool that is otherwise NaN."""
        count = -(-(end - first) // page)
        rows, dim = self.keys.shape[1:]
        pool = self.keys.new_full((count + 3, rows, 2, page, dim), torch.nan)
        table = torch.randperm(count + 3, dtype=torch.int32)[:count]
        for i, number in enumerate(table.tolist()):
            here = slice(first + i * page, min(first + (i + 1) * page, end))
            for kind, vectors in enumerate((self.keys, self.values)):
                part = vectors[here].transpose(0, 1)
                pool[number, :, kind, : part.shape[1]] = part
        return kernels.KeyRun.of_pages(pool, table, end - first)


def make_prompt(
    tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, **how: Any
) -> Prompt:
    kv_heads, group, key_dim, value_dim = shape
    heads = kv_heads * group
    stacked = torch.randn(tokens, heads + kv_heads, key_dim).to(dtype)
    values = (torch.randn(tokens, kv_heads, value_dim + 8) + 0.5).to(dtype)
    for name in ("sinks", "slopes"):
        if how.get(name):
            how[name] = torch.rand(heads) * (4 if name == "sinks" else 0.3)
    return Prompt(
        q=stacked[:, :heads], keys=stacked[:, heads:], values=values[..., :value_dim], how=how
    )


def expected_of(prompt: Prompt) -> torch.Tensor:
    """The softmax of all scores at once, float64."""
    how, tokens, dim = prompt.how, len(prompt.q), prompt.q.shape[2]
    group = prompt.q.shape[1] // prompt.keys.shape[1]
    q = prompt.q.double().transpose(0, 1)
    keys, values = (
        x.double().repeat_interleave(group, dim=1).transpose(0, 1)
        for x in (prompt.keys, prompt.values)
    )
    scores = q @ keys.transpose(1, 2) * how.get("scale", dim**-0.5)
    if cap := how.get("soft_cap"):
        scores = cap * (scores / cap).tanh()
    positions = torch.arange(tokens)
    distances = positions[:, None] - positions
    if (slopes := how.get("slopes")) is not None:
        scores = scores - slopes[:, None, None].double() * distances
    window = how.get("window") or tokens
    first = positions - (positions % window if how.get("is_chunked") else window - 1)
    scores[:, (distances < 0) | (positions < first[:, None])] = -torch.inf
    if (sinks := how.get("sinks")) is not None:
        column = sinks.double().view(-1, 1, 1).expand(-1, tokens, 1)
        scores = torch.cat([scores, column], dim=2)
    shares = scores.softmax(-1)[..., :tokens]
    expected: torch.Tensor = (shares @ values).transpose(0, 1)
    return expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for tokens in (1, 7, 64, 130):
        prompt = make_prompt(tokens, shape, dtype)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            prompt.whole.double(), expected_of(prompt), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules(rule: str, dtype: torch.dtype) -> None:
    prompt = make_prompt(210, (2, 3, 32, 32), dtype, **RULES[rule])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        prompt.whole.double(), expected_of(prompt), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_prompt_change_no_bit(rule: str, dtype: torch.dtype) -> None:
    prompt = make_prompt(210, (2, 3, 40, 40), dtype, **RULES[rule])
    whole = prompt.whole
    for size in CUTS:
        ends = [*range(0, 210, size), 210]
        parts = [prompt.attend(first, end) for first, end in pairwise(ends)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [32, 64, 96, 160])
def test_a_prefix_elsewhere_changes_no_bit(rule: str, length: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        prompt = make_prompt(200, (2, 3, 40, 40), dtype, **RULES[rule])
        expected = prompt.whole[length:]
        own = prompt.run(length, 200)
        for prefix in (prompt.run(0, length), prompt.paged_run(0, length)):
            assert torch.equal(prompt.attend(length, 200, prefix, own), expected)


def test_runs_of_any_length_change_no_bit() -> None:
    prompt = make_prompt(150, (2, 2, 16, 16), torch.bfloat16)
    ends = [0, 5, 37, 38, 101, 150]
    runs = [prompt.run(*ends[:2]), *(prompt.paged_run(*cut) for cut in pairwise(ends[1:]))]
    assert torch.equal(prompt.attend(0, 150, *runs), prompt.whole)


def test_keys_before_a_window_may_be_missing() -> None:
    prompt = make_prompt(150, (2, 2, 16, 16), torch.float32, window=30)
    expected = prompt.whole[100:]
    for first_key in (64, 71):
        own = prompt.run(first_key, 150)
        assert torch.equal(prompt.attend(100, 150, own, first_key=first_key), expected)


def test_later_keys_are_not_seen() -> None:
    prompt = make_prompt(100, (2, 2, 16, 16), torch.float32)
    expected = prompt.whole[:90]
    prompt.keys[90:] = torch.nan
    prompt.values[90:] = 7
    assert torch.equal(prompt.attend(0, 90, prompt.run(0, 100)), expected)


def test_threads_change_no_bit() -> None:
    prompt = make_prompt(150, (2, 3, 64, 64), torch.bfloat16)
    expected, threads = prompt.whole, torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(prompt.whole, expected)
    finally:
        torch.set_num_threads(threads)
