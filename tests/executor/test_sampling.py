"""The sampler's distribution, and that nothing but its seed, sequence and step decide a draw."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from executor.model.sampling import Sampler, _place_of
from profiles.errors import InputError, RunError

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))


def draw(sampler: Sampler, count: int) -> torch.Tensor:
    return sampler.sample(LOGITS.expand(count, -1), range(count), step=0)


def chi_square_p(sampler: Sampler, expected: list[float], count: int = 4000) -> float:
    counts = draw(sampler, count).bincount(minlength=5)[: len(expected)]
    assert counts.sum() == count
    total = math.fsum(expected)
    return float(stats.chisquare(counts.tolist(), [count * e / total for e in expected]).pvalue)


def test_draws_follow_the_softmax() -> None:
    assert chi_square_p(Sampler(temperature=1.0, seed=1), LOGITS.exp().tolist()) > 0.001


def test_temperature_sharpens() -> None:
    expected = (LOGITS / 0.5).softmax(-1).tolist()
    assert chi_square_p(Sampler(temperature=0.5, seed=2), expected) > 0.001
    assert chi_square_p(Sampler(temperature=1.0, seed=2), expected) < 1e-6


def test_top_k_keeps_the_likeliest_and_renormalises() -> None:
    assert chi_square_p(Sampler(temperature=1.0, top_k=2, seed=3), [4 / 7, 3 / 7]) > 0.001


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # 0.4 + 0.3 falls short of 0.75, so the third is kept.
    expected = [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]
    assert chi_square_p(Sampler(temperature=1.0, top_p=0.75, seed=4), expected) > 0.001
    assert set(draw(Sampler(temperature=1.0, top_p=0.01), 50).tolist()) == {0}


def test_top_k_and_top_p_limit_together() -> None:
    # Of the three kept by top-k the first two hold 0.82 of what is left.
    sampler = Sampler(temperature=1.0, top_k=3, top_p=0.8, seed=5)
    assert chi_square_p(sampler, [4 / 7, 3 / 7]) > 0.001


def test_top_k_of_one_is_greedy() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    greedy = Sampler().sample(logits, range(40), 0)
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(Sampler(temperature=1.3, top_k=1).sample(logits, range(40), 0), greedy)
    assert greedy.dtype == torch.int64


@pytest.mark.parametrize("limits", [{}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.7}])
def test_a_draw_does_not_depend_on_its_batch(limits: dict[str, float]) -> None:
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(temperature=0.8, seed=9, **limits)  # type: ignore[arg-type]
    together = sampler.sample(logits, torch.arange(12), 3)
    alone = [int(sampler.sample(logits[i : i + 1], [i], 3)) for i in range(12)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert together.tolist() == alone
    assert torch.equal(sampler.sample(logits[order], order, 3), together[order])


def test_seed_sequence_and_step_each_change_the_draw() -> None:
    flat = torch.zeros(1, 1_000_000)

    def one(seed: int, sequence: int, step: int) -> int:
        return int(Sampler(temperature=1.0, seed=seed).sample(flat, [sequence], step))

    draws = [one(s, q, t) for s in (0, 1, 2**64 - 1) for q in (0, 1) for t in (0, 1)]
    assert len(set(draws)) == len(draws)
    assert one(1, 1, 1) == one(1, 1, 1)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((200, 5), -math.inf)
    logits[:, 3] = 0.0
    assert set(Sampler(temperature=1.0).sample(logits, range(200), 0).tolist()) == {3}


@pytest.mark.parametrize("width", [5, 128, 1000])
def test_each_token_is_drawn_by_the_middle_of_its_share(width: int) -> None:
    weights = torch.rand(width, generator=torch.Generator().manual_seed(width)) ** 9
    # The first and the last tokens are impossible, and some between.
    weights[weights < 1e-3] = 0
    weights[[0, -1]] = 0
    ends = weights.double().cumsum(0)
    tokens = weights.nonzero()[:, 0]
    middles = (ends - weights.double() / 2)[tokens] / ends[-1]
    shares = torch.cat([torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), middles])
    places = _place_of(weights.expand(len(shares), -1), shares)[:, 0].tolist()
    assert places == [int(tokens[0]), int(tokens[-1]), *tokens.tolist()]


def test_tiny_temperatures_do_not_overflow() -> None:
    assert draw(Sampler(temperature=1e-30), 5).tolist() == [0] * 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_run(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    with pytest.raises(RunError, match="not finite"):
        Sampler(temperature=temperature).sample(logits, [0, 1], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"temperature": 1.0, "top_k": -1}, "top-k: got -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p: got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top-p: got 1.1"),
        ({"temperature": 1.0, "top_p": math.nan}, "top-p: got nan"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**64}, "seed"),
        ({"top_k": 5}, "temperature above 0"),
        ({"top_p": 0.5}, "temperature above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**arguments)  # type: ignore[arg-type]
