"""Which sequences run in a pass: every job ends within its pages, whatever was expected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE, PoolSizes
from costmodel.plan.prefixes import Prefixes
from costmodel.schedule.admission import LOOKAHEAD, MOST_OVERTAKEN, Admission, longest_first
from costmodel.schedule.page_rules import is_safe, runs_alone
from costmodel.schedule.pass_lanes import PassLanes
from profiles.errors import InputError


@dataclass(frozen=True)
class Job:
    """A job with the true lengths of its answers."""

    lengths: Lengths
    answers: list[int]
    pool: PoolSizes
    most_lanes: int
    pass_rows: int

    def admission(self, **changes: object) -> Admission:
        """Return a new admission of the job."""
        return Admission(
            self.lengths,
            self.pool,
            most_lanes=self.most_lanes,
            batch_lanes=max(1, self.most_lanes // 2),
            pass_rows=self.pass_rows,
            **changes,  # type: ignore[arg-type]  # keywords of the constructor
        )


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Draw lengths, guesses that are wrong by up to ten times, and a pool with room for any one."""
    count = draw(st.integers(1, 16))
    prompts = draw(st.lists(st.integers(1, 200), min_size=count, max_size=count))
    answers = draw(st.lists(st.integers(1, 80), min_size=count, max_size=count))
    wrong = draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    above = draw(st.lists(st.integers(0, 100), min_size=count, max_size=count))
    limits = [a + b for a, b in zip(answers, above, strict=True)]
    outputs = [max(1, round(a * w)) for a, w in zip(answers, wrong, strict=True)]
    prefixes = _draw_prefixes(draw, prompts)
    lengths = Lengths(prompts, outputs, limits, prefixes=prefixes)
    most = draw(st.sampled_from([(None,), (2,), (None, 2), (1, None, 3)]))
    unbounded = PoolSizes(pages=(0,) * len(most), most_pages=most)
    alone = np.max([unbounded.needed(int(n)) for n in lengths.stored], axis=0)
    pages = tuple(int(n * draw(st.floats(1, 6))) for n in alone)
    most_lanes = draw(st.integers(1, 8))
    pass_rows = max(prompts) + most_lanes - 1 + draw(st.integers(0, 300))
    return Job(lengths, answers, PoolSizes(pages=pages, most_pages=most), most_lanes, pass_rows)


def _draw_prefixes(draw: st.DrawFn, prompts: list[int]) -> Prefixes:
    tokens = draw(st.lists(st.integers(2, 4).map(lambda n: n * PAGE), max_size=3))
    numbers = [
        draw(st.sampled_from([-1, *(i for i, n in enumerate(tokens) if n < prompt)]))
        for prompt in prompts
    ]
    return Prefixes(np.array(numbers), np.array(tokens, np.int64))


@settings(deadline=None, max_examples=80)
@given(jobs(), st.sampled_from([None, 1, 100]))
def test_every_job_ends_within_its_pages(job: Job, prompt_tokens: int | None) -> None:
    admission = job.admission(prompt_tokens=prompt_tokens)
    lengths = job.lengths
    at_work: dict[int, list[int]] = {}
    waited: dict[int, int] = {}
    done: list[int] = []
    present: set[int] = set()
    prefix_of: dict[int, int] = {}
    # In each pass a lane goes on, so that the tokens of all answers bound the passes.
    for number in range(sum(job.answers) + 1):
        lanes = admission.plan()
        if lanes is None:
            break
        assert lanes.number == number
        decoding, newcomers, waiting = (
            x.tolist() for x in (lanes.decoding, lanes.newcomers, lanes.waiting)
        )
        requests = lanes.requests.tolist()
        assert decoding or newcomers
        assert not (waiting and newcomers)
        assert sorted(decoding + waiting) == sorted(at_work)
        assert not set(newcomers) & set(at_work)
        assert max([*decoding, *newcomers]) < job.most_lanes
        # A prefix is computed by one lane and found by all others, until it is dropped.
        assert not set(lanes.dropped) & {prefix_of[request] for request, _ in at_work.values()}
        present -= set(lanes.dropped)
        for request, prefix, skipped in zip(
            requests, lanes.prefixes.tolist(), lanes.skipped.tolist(), strict=True
        ):
            assert prefix in (-1, lengths.prefixes.numbers[request])
            assert skipped == (lengths.prefixes.tokens[prefix] if prefix in present else 0)
            prefix_of[request] = prefix
            present |= {prefix} - {-1}
        rows = sum(lengths.prompts[requests]) - sum(lanes.skipped.tolist())
        assert len(decoding) + rows <= job.pass_rows
        for lane in decoding:
            at_work[lane][1] += 1
        at_work |= {lane: [request, 1] for lane, request in zip(newcomers, requests, strict=True)}
        # Independent of ``Admission``: the pages of every lane, counted one by one.
        held = [0] * len(job.pool.pages)
        for request, step in at_work.values():
            tokens = lengths.prompts[request] + step - 1 if lengths.limits[request] > 1 else 0
            prefix = prefix_of[request]
            shared = lengths.prefixes.tokens[prefix] // PAGE if prefix >= 0 else 0
            own = [
                max(0, n - shared) if most is None else n
                for n, most in zip(job.pool.needed(int(tokens)), job.pool.most_pages, strict=True)
            ]
            held = [a + b for a, b in zip(held, own, strict=True)]
        for prefix in {prefix_of[request] for request, _ in at_work.values()} - {-1}:
            pages = job.pool.needed(int(lengths.prefixes.tokens[prefix]))
            held = [a + b for a, b in zip(held, pages, strict=True)]
        assert held == admission.used_pages.tolist()
        assert all(a <= b for a, b in zip(held, job.pool.pages, strict=True))
        # Nobody waits longer than the others may take.
        for lane in at_work:
            waited[lane] = waited.get(lane, 0) + 1 if lane in waiting else 0
            assert waited[lane] <= sum(lengths.limits[r] - s for r, s in at_work.values())
        _check_batches(lanes)
        gone = [lane for lane, (r, s) in at_work.items() if s == job.answers[r]]
        done += [at_work.pop(lane)[0] for lane in gone]
        admission.ended(gone)
    assert lanes is None
    assert sorted(done) == list(range(len(lengths)))
    assert admission.used_pages.tolist() == [0] * len(job.pool.pages)


def _check_batches(lanes: PassLanes) -> None:
    batches = lanes.batches
    assert [lane for batch in batches for lane in batch.decoding] == lanes.decoding.tolist()
    pairs = list(zip(lanes.newcomers.tolist(), lanes.requests.tolist(), strict=True))
    assert [pair for batch in batches for pair in batch.newcomers] == pairs
    sizes = [len(batch.decoding) + len(batch.newcomers) for batch in batches]
    assert 1 <= min(sizes) <= max(sizes) <= min(lanes.batch_lanes, min(sizes) + 1)


@settings(deadline=None, max_examples=60)
@given(jobs())
def test_skipped_passes_are_those_that_would_have_been_planned(job: Job) -> None:
    def run(*, skips: bool) -> list[tuple[int, int]]:
        """Return the pass and the request of each end."""
        admission, ends, number = job.admission(), [], -1
        while admission.plan() is not None:
            number += 1
            left = np.array(job.answers)[admission.requests] - admission.steps
            if skips and left.min() > 1:
                number += admission.skip(int(left.min()) - 1)
            left = np.array(job.answers)[admission.requests] - admission.steps
            ends += [(number, r) for r in admission.requests[left == 0].tolist()]
            admission.ended(admission.lanes[left == 0].tolist())
        return ends

    assert run(skips=True) == run(skips=False)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(-1, 1)), max_size=5),
    st.integers(0, 12),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_a_state_is_safe_where_some_order_of_ends_exists(
    lanes: list[tuple[int, int, int]], free: int, prefixes: tuple[int, int]
) -> None:
    def can_end(left: list[tuple[int, int, int]], free: int) -> bool:
        return not left or any(
            more <= free and can_end(rest, free + held + freed(prefix, rest))
            for i, (held, more, prefix) in enumerate(left)
            for rest in [left[:i] + left[i + 1 :]]
        )

    def freed(prefix: int, left: list[tuple[int, int, int]]) -> int:
        return 0 if prefix < 0 or any(p == prefix for _, _, p in left) else prefixes[prefix]

    held, more, numbers = np.array(lanes, np.int64).reshape(-1, 3).T
    pages = np.array([*prefixes, 0])[:, None]
    found = is_safe(held[:, None], more[:, None], np.array([free]), numbers, pages)
    assert found == can_end(lanes, free)


def test_nobody_waits_where_answers_are_as_long_as_expected_in_whole_pages() -> None:
    # Every answer has as many tokens as a page, so that no rounding is foreseen wrongly.
    rng = np.random.default_rng(0)
    lengths = Lengths(rng.integers(1, 9, 200) * PAGE, np.full(200, 4 * PAGE))
    admission = Admission(
        lengths,
        PoolSizes(pages=(120,), most_pages=(None,)),
        most_lanes=40,
        batch_lanes=40,
        pass_rows=2000,
    )
    while (lanes := admission.plan()) is not None:
        assert not len(lanes.waiting)
        admission.ended(admission.lanes[admission.steps == 4 * PAGE])


def test_equal_sequences_fill_the_pool_at_once() -> None:
    # 100 + 29 - 1 tokens are four pages, and 16 lanes have 64.
    lengths = Lengths([100] * 20, [29] * 20)
    pool = PoolSizes(pages=(64,), most_pages=(None,))
    admission = Admission(lengths, pool, most_lanes=20, batch_lanes=10, pass_rows=4000)
    first = admission.plan()
    assert first is not None
    assert first.requests.tolist() == list(range(16))


def test_longest_answers_come_first() -> None:
    lengths = Lengths([5, 9, 9, 2], [7, 3, 3, 8])
    assert longest_first(lengths).tolist() == [3, 0, 1, 2]
    assert longest_first(lengths, np.array([2, 1])).tolist() == [1, 2]


def test_a_long_prompt_is_overtaken_but_not_for_ever() -> None:
    # One request that needs most of 40 pages, in front of many that need one each and end in turn.
    small = 4 * MOST_OVERTAKEN
    lengths = Lengths([1000] + [10] * small, [200, *(5 + i % 9 for i in range(small))])
    pool = PoolSizes(pages=(40,), most_pages=(None,))
    order = np.array([*range(1, 31), 0, *range(31, small + 1)])
    admission = Admission(lengths, pool, most_lanes=30, batch_lanes=30, pass_rows=1100, order=order)
    admitted: list[int] = []
    while (lanes := admission.plan()) is not None:
        admitted += lanes.requests.tolist()
        admission.ended(admission.lanes[admission.steps == lengths.outputs[admission.requests]])
    place = admitted.index(0)
    # At its turn it does not fit; the count of those that overtake it is bounded.
    assert 30 < place <= 30 + MOST_OVERTAKEN + 30
    assert sorted(admitted) == list(range(small + 1))
    assert LOOKAHEAD <= MOST_OVERTAKEN


def test_prompts_of_a_prefix_share_its_pages() -> None:
    # Eight lanes of 5 pages each would take 40; with 3 shared pages they take 3 + 8 * 2.
    prefixes = Prefixes(np.zeros(9, np.int64), np.array([96]))
    lengths = Lengths([100] * 9, [61] * 9, prefixes=prefixes)
    pool = PoolSizes(pages=(19,), most_pages=(None,))
    admission = Admission(lengths, pool, most_lanes=9, batch_lanes=9, pass_rows=140)
    lanes = admission.plan()
    assert lanes is not None
    # The rows are those of one prompt and seven suffixes.
    assert lanes.skipped.tolist() == [0] + [96] * 7 and lanes.requests.tolist() == [*range(8)]
    assert admission.used_pages.tolist() == [3 + 8]
    admission.ended(range(8))
    # The prefix rests until the ninth finds it.
    assert admission.used_pages.tolist() == [0]
    lanes = admission.plan()
    assert lanes is not None and lanes.skipped.tolist() == [96] and not lanes.dropped
    admission.ended([int(lanes.newcomers[0])])
    assert admission.used_pages.tolist() == [0] and admission.plan() is None


def test_a_resting_prefix_is_dropped_for_others_and_computed_again() -> None:
    prefixes = Prefixes(np.array([0, -1, 0]), np.array([64]))
    lengths = Lengths([70, 120, 70], [2, 9, 2], prefixes=prefixes)
    pool = PoolSizes(pages=(4,), most_pages=(None,))
    admission = Admission(
        lengths, pool, most_lanes=1, batch_lanes=1, pass_rows=120, order=np.arange(3)
    )
    found = []
    while (lanes := admission.plan()) is not None:
        found += [(r, int(lanes.skipped[0]), lanes.dropped) for r in lanes.requests.tolist()]
        admission.ended(admission.lanes[admission.steps == lengths.outputs[admission.requests]])
    assert found == [(0, 0, ()), (1, 0, (0,)), (2, 0, ())]


def test_requests_that_cannot_run_are_told_and_refused() -> None:
    lengths = Lengths([10, 100, 10], [10, 10, 200])
    pool = PoolSizes(pages=(4,), most_pages=(None,))
    runs = runs_alone(lengths, pool, most_lanes=3, pass_rows=50)
    assert runs.tolist() == [True, False, False]
    with pytest.raises(InputError, match="2 that do not fit"):
        Admission(lengths, pool, most_lanes=3, batch_lanes=3, pass_rows=50)
    order = np.flatnonzero(runs)
    admission = Admission(lengths, pool, most_lanes=3, batch_lanes=3, pass_rows=50, order=order)
    lanes = admission.plan()
    assert lanes is not None
    assert lanes.requests.tolist() == [0]
