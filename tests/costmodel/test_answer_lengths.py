"""Expected lengths of answers, against estimates made by hand and against what was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from costmodel.plan.answer_lengths import (
    EXACT_LEN,
    LEAST_ENDED,
    MOST_ANSWERS,
    AnswerCounts,
    AnswerHistory,
    kind_of,
    rounded_len,
)


def test_the_mean_below_each_limit_is_the_one_made_by_hand() -> None:
    """Five answers: they ended at 2, 3 and 5 tokens, and were cut at 3 and 6.

    Five are at risk at 2, four at 3 and two at 5. So 4/5 exceed 2 tokens, 4/5 x 3/4 = 3/5 exceed 3,
    and 3/5 x 1/2 = 3/10 exceed 5 and all that follows. Each token that an answer exceeds adds its
    share to the mean.
    """
    counts = AnswerCounts()
    for length, is_cut in ((2, False), (3, False), (3, True), (5, False), (6, True)):
        counts.add(length, is_cut=is_cut)
    expected = {1: 1.0, 2: 2.0, 3: 2.8, 4: 3.4, 5: 4.0, 6: 4.3, 10: 5.5}
    found = counts.expected(np.array([*expected], np.int64))
    assert found == pytest.approx([*expected.values()], rel=1e-12)


def test_without_cut_answers_it_is_the_mean_of_cut_ones() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, EXACT_LEN, size=200)
    counts = AnswerCounts()
    for length in lengths.tolist():
        counts.add(length, is_cut=False)
    limits = np.array([1, 5, 20, 100], np.int64)
    means = [np.minimum(lengths, limit).mean() for limit in limits]
    assert counts.expected(limits) == pytest.approx(means, rel=1e-12)


def test_answers_that_were_cut_do_not_shorten_the_estimate() -> None:
    """Half of the runs cut at 100 tokens; the answers are those of the others."""
    rng = np.random.default_rng(2)
    lengths = np.maximum(1, rng.lognormal(np.log(60), 0.9, 4000).astype(int))
    history = AnswerHistory()
    limits = np.where(np.arange(len(lengths)) % 2, 100, 10_000)
    answers = np.minimum(lengths, limits)
    history.add(np.full(len(lengths), 9).tolist(), answers.tolist(), (lengths > limits).tolist())
    asked = np.array([50, 100, 400, 2000], np.int64)
    found = history.expected(np.full(len(asked), 9), asked)
    means = [np.minimum(lengths, limit).mean() for limit in asked]
    assert found == pytest.approx(means, rel=0.05)
    assert (found <= asked).all()


def test_kinds_of_prompts_with_few_answers_take_those_of_all() -> None:
    history = AnswerHistory()
    history.add([5] * LEAST_ENDED, [10] * LEAST_ENDED, [False] * LEAST_ENDED)
    history.add([100] * LEAST_ENDED, [30] * LEAST_ENDED, [False] * LEAST_ENDED)
    history.add([1000], [500], [True])
    prompts = np.array([4, 7, 100, 1000, 30], np.int64)
    limits = np.array([100, 8, 20, 100, 100], np.int64)
    # Of all, 40 of 41 ended at 10 or 30, and one was longer: 10 + 21/41 x 20 + 1/41 x 70.
    together = round(10 + 21 / 41 * 20 + 70 / 41)
    assert history.expected(prompts, limits).tolist() == [10, 8, 20, together, together]


def test_without_answers_that_ended_the_limit_is_expected() -> None:
    history = AnswerHistory()
    limits = np.array([7, 70], np.int64)
    assert history.expected(np.array([3, 4]), limits).tolist() == [7, 70]
    history.add([3] * 500, [10] * 500, [True] * 500)
    assert history.expected(np.array([3, 4]), limits).tolist() == [7, 70]


def test_few_different_lengths_are_kept() -> None:
    lengths = [*range(1, 200_000)]
    assert all(rounded_len(n) == n for n in lengths[:EXACT_LEN])
    rounded = np.array([rounded_len(n) for n in lengths])
    assert (np.abs(rounded / np.array(lengths) - 1) <= 1 / 32).all()
    assert len(set(rounded.tolist())) < 260
    assert [kind_of(n) for n in (1, 2, 3, 4, 1023, 1024, 2**30)] == [0, 1, 1, 2, 9, 10, 20]


def test_old_answers_lose_weight() -> None:
    counts = AnswerCounts()
    for _ in range(MOST_ANSWERS):
        counts.add(8, is_cut=False)
    counts.add(3, is_cut=False)
    assert counts.ended.total() == MOST_ANSWERS // 2
    for _ in range(MOST_ANSWERS // 2):
        counts.add(16, is_cut=False)
    assert counts.ended[16] == counts.ended[8]
