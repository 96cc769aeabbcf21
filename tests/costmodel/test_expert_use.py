"""Zipf's law of routing: its shares, the experts that tokens need, and the skew of counts."""

from __future__ import annotations

import numpy as np
import pytest

from costmodel.model.expert_use import MOST_CHOSEN, SLACK, chances, needed_of_rarest, skew_of
from costmodel.model.feed_forward_spec import ExpertsSpec, MlpSpec


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("count", "chosen"), [(128, 8), (8, 2), (256, 8), (8, 4)])
def test_shares_follow_the_law(count: int, chosen: int, skew: float) -> None:
    shares = chances(count, chosen, skew)
    assert shares.sum() == pytest.approx(chosen)
    most = max(MOST_CHOSEN, chosen / count)
    assert shares.max() <= most * (1 + 1e-9)
    free = shares < most * (1 - 1e-9)
    scales = (shares * np.arange(1, count + 1) ** skew)[free]
    assert scales == pytest.approx(scales[:1].repeat(len(scales)))


@pytest.mark.parametrize("num_tokens", [1, 4, 64])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_tokens_need_as_many_experts_as_draws_say(num_tokens: int, skew: float) -> None:
    rng = np.random.default_rng(0)
    shares = chances(32, 4, skew)
    is_chosen = np.less(rng.random((2000, num_tokens, 32)), shares)
    needed = is_chosen.max(axis=1)[:, 20:].sum(axis=1)
    error = needed.std() / len(needed) ** 0.5
    found = needed_of_rarest(32, 4, skew, num_tokens, 12 / 32)
    assert abs(needed.mean() - found) <= 4 * error + 1e-9
    spec = ExpertsSpec(num_experts=32, experts_per_token=4, expert=MlpSpec(size=8))
    assert spec.touched(num_tokens, skew, 12 / 32) == pytest.approx(found)


@pytest.mark.parametrize("true", [0.0, 0.4, 1.0, 1.6])
def test_counts_of_the_law_have_its_skew_and_never_promise_more(true: float) -> None:
    rng = np.random.default_rng(1)
    # Ranked by one half of the counts, and looked up in the other.
    ranked, counted = (rng.multinomial(80_000, chances(64, 4, true) / 4) for _ in range(2))
    shares = counted[np.argsort(-ranked, kind="stable")] * 4 / counted.sum()
    found = skew_of(shares, 4)
    assert 0.75 * true <= found <= true + 0.1
    for num_tokens in (1, 4, 16):
        rare = np.concatenate([[0], (1 - (1 - shares[::-1]) ** num_tokens).cumsum()])
        for count in range(65):
            needed = needed_of_rarest(64, 4, found, num_tokens, count / 64)
            assert needed >= rare[count] - SLACK * 4 * num_tokens


def test_a_few_hot_experts_among_many_alike_promise_little() -> None:
    """The rarest of them are as common as without any hot ones, nearly."""
    shares = np.full(64, 0.05)
    shares[:2] = 0.45
    assert skew_of(shares * 4 / shares.sum(), 4) < 0.4
