"""The lengths of a job: moments over all passes, and their sketch, against sequences one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.model.cache import CacheSpec
from costmodel.plan.lengths import EXACT_ANSWERS, Lengths, Sketch
from costmodel.plan.prefixes import Prefixes
from costmodel.plan.workload import Workload
from profiles.errors import InputError

CACHE = CacheSpec(rows_per_sequence=1, width=64, row_bytes=256, full_row_bytes=256)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=6),
    st.sampled_from([None, 20, 64]),
)
def test_moments_are_those_of_every_pass_of_every_sequence(
    pairs: list[tuple[int, int]], window: int | None
) -> None:
    prompts, outputs = zip(*pairs, strict=True)
    lengths = Lengths(prompts, outputs)
    kept = [p + step for p, g in pairs for step in range(g)]
    assert lengths.mean_context == pytest.approx(np.mean(kept))
    assert lengths.sd_context == pytest.approx(np.std(kept), abs=1e-4)
    # A window of 20 tokens takes a page of 32.
    ring = {None: 10**9, 20: 32, 64: 64}[window]
    mean, deviation = lengths.slots(replace(CACHE, window=window))
    assert mean == pytest.approx(np.mean(np.minimum(kept, ring)))
    assert deviation == pytest.approx(np.std(np.minimum(kept, ring)), abs=1e-4)


def test_long_answers_weigh_more() -> None:
    lengths = Lengths([100, 100], [1, 99])
    assert (lengths.mean_prompt, lengths.mean_output) == (100, 50)
    assert lengths.mean_context == pytest.approx((100 + 99 * (100 + 49)) / 100)


def test_answers_end_at_their_limits() -> None:
    lengths = Lengths([10, 10, 7], [50, 20, 1], [30, 40, 1])
    assert lengths.outputs.tolist() == [30, 20, 1]
    # The last token takes no place, and one token of output reads no cache.
    assert lengths.stored.tolist() == [39, 49, 0]


def test_a_sketch_keeps_the_longest_answers_and_the_means() -> None:
    rng = np.random.default_rng(3)
    prompts = np.clip(60 * np.exp(rng.normal(0, 1.4, 5000)), 1, 6000).astype(int)
    outputs = np.clip(120 * np.exp(rng.normal(0, 0.87, 5000)), 1, 2000).astype(int)
    lengths = Lengths(prompts, outputs, 2 * outputs)
    sketch = lengths.sketch()
    assert len(sketch.prompts) <= 48
    again = sketch.lengths()
    assert len(again) == 5000
    longest = np.sort(outputs)[-EXACT_ANSWERS:]
    assert np.sort(again.outputs)[-EXACT_ANSWERS:].tolist() == longest.tolist()
    assert again.mean_prompt == pytest.approx(lengths.mean_prompt, rel=0.01)
    assert again.mean_output == pytest.approx(lengths.mean_output, rel=0.01)
    assert again.mean_context == pytest.approx(lengths.mean_context, rel=0.03)
    assert again.limits.mean() == pytest.approx(lengths.limits.mean(), rel=0.01)


@pytest.mark.parametrize("count", [1, 3, 9, 48, 60])
def test_a_short_job_is_its_own_sketch(count: int) -> None:
    lengths = Lengths(range(1, count + 1), [5] * count)
    sketch = lengths.sketch()
    assert sum(sketch.weights) == count
    assert len(sketch.weights) <= 48
    if count <= 9:
        assert sorted(sketch.prompts) == list(range(1, count + 1))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], []), "lengths of prompts: got 0 for 0 prompts"),
        (([1, 2], [3]), "lengths of outputs: got 1 for 2 prompts"),
        (([1, 0], [3, 4]), "lengths of prompts: got 0"),
        (([1, 2], [3, 4], [0, 1]), "lengths of limits: got 0"),
    ],
)
def test_bad_lengths_are_refused(columns: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lengths(*columns)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
@settings(deadline=None, max_examples=25)
def test_a_sketch_is_the_lengths_of_its_workload(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, outputs, limits = rng.integers(1, 500, (3, size))
    lengths = Lengths(prompts, outputs, limits)
    sketch = lengths.sketch()
    Workload(
        prompt_len=int(prompts.max()),
        gen_len=int(limits.max()),
        num_prompts=size,
        lengths=sketch,
    )
    assert sketch.lengths().stored.max() == lengths.stored.max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_len": 11}, r"workload\.prompt_len.*11.*allowed: 10"),
        ({"gen_len": 4}, r"workload\.gen_len.*4.*allowed: 6"),
        ({"num_prompts": None}, r"workload\.num_prompts.*None.*allowed: 3"),
    ],
)
def test_lengths_of_another_job_are_refused(changes: dict[str, int | None], said: str) -> None:
    sketch = Sketch(prompts=(10, 3), outputs=(4, 5), limits=(4, 6), weights=(1, 2))
    work: dict[str, int | None] = {"prompt_len": 10, "gen_len": 6, "num_prompts": 3}
    Workload(**work, lengths=sketch)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        Workload(**work | changes, lengths=sketch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (((), (), (), ()), "0, 0, 0, 0 entries"),
        (((1, 2), (1, 1), (1, 1), (1,)), "2, 2, 2, 1 entries"),
        (((1,), (1,), (1,), (2 * 10**9,)), "2000000000; allowed: 1 to"),
        (((1,), (1,), (1,), (0,)), "0; allowed: 1 to 1000000000"),
    ],
)
def test_a_sketch_of_uneven_or_empty_columns_is_refused(
    columns: tuple[tuple[int, ...], ...], said: str
) -> None:
    prompts, outputs, limits, weights = columns
    with pytest.raises(InputError, match=said):
        Sketch(prompts=prompts, outputs=outputs, limits=limits, weights=weights)


def test_a_smaller_sketch_has_the_same_proportions() -> None:
    sketch = Sketch(
        prompts=(900, 10, 20, 5),
        outputs=(90, 9, 3, 1),
        limits=(90, 9, 3, 1),
        weights=(1, 2, 40, 600),
    )
    small = sketch.scaled(80)
    assert small.num_prompts == 80
    assert dict(zip(small.prompts, small.weights, strict=True)) == {900: 1, 20: 5, 5: 74}
    assert sketch.scaled(643) == sketch


def test_a_sketch_keeps_the_largest_prefixes() -> None:
    rng = np.random.default_rng(3)
    tokens = np.array([64, 320, 96, 128, 512, 160])
    numbers = rng.choice(np.arange(-1, 6), 400, p=[0.1, 0.02, 0.4, 0.02, 0.16, 0.2, 0.1])
    prefixes = Prefixes(numbers, tokens)
    own = rng.integers(1, 200, 400)
    lengths = Lengths(own + prefixes.of_prompts, rng.integers(1, 99, 400), prefixes=prefixes)
    sketch = lengths.sketch()
    assert sketch.prefix_tokens == (320, 512, 128, 160)
    found = sketch.lengths()
    kept = np.isin(numbers, [1, 3, 4, 5])
    for place, number in enumerate((1, 4, 3, 5)):
        assert (found.prefixes.numbers == place).sum() == (numbers == number).sum()
    assert found.own.mean_prompt == pytest.approx(
        (lengths.prompts - np.where(kept, prefixes.of_prompts, 0)).mean(), rel=0.02
    )
    scaled = sketch.scaled(100).lengths()
    shares = [np.bincount(x.prefixes.numbers + 1, minlength=5) / len(x) for x in (found, scaled)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
    with pytest.raises(InputError, match=r"lengths\.prefixes"):
        replace(sketch, prefix_tokens=(64,))
