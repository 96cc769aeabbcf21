"""The seconds of a pipeline against one that is played out, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.cluster.pipeline import StageSeconds, price_round

PASSES = (8.0, 8.0, 15.0)


def _played(
    stages: Sequence[StageSeconds], links: Sequence[StageSeconds], passes: Sequence[float]
) -> float:
    """Return the seconds until the last block has left the last stage for the last time.

    Every stage and every link takes the blocks one by one, in turns.
    """
    ring = [server for pair in zip(stages, links, strict=True) for server in pair]
    free, ready = [0.0] * len(ring), [0.0] * len(stages)
    segments = [None] + [i for i, count in enumerate(passes) for _ in range(round(count))]
    end = 0.0
    for segment in segments:
        for block in range(len(stages)):
            now = ready[block]
            for place, server in enumerate(ring):
                seconds = server.prefill if segment is None else server.decode[segment]
                now = free[place] = max(now, free[place]) + seconds
                # The way back matters only to a pass that follows.
                if place == len(ring) - 2:
                    end = max(end, now)
            ready[block] = now
    return end


def _servers(count: int, prefill: float, decode: float) -> list[StageSeconds]:
    return [StageSeconds(prefill=prefill, decode=(decode,) * len(PASSES)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_stages_without_a_network(count: int) -> None:
    """The last stage waits for the first block, takes all, and is never idle again."""
    stages, links = _servers(count, 3.0, 0.25), _servers(count, 0.0, 0.0)
    found = price_round(stages, links, PASSES)
    assert found.prefill_s == pytest.approx((2 * count - 1) * 3.0)
    assert found.decode_s == pytest.approx(31 * count * 0.25)
    assert found.seconds == pytest.approx(_played(stages, links, PASSES))


@given(
    prefill=st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    decode=st.lists(st.floats(0.1, 1), min_size=6, max_size=6),
    link=st.floats(0, 0.5),
    growth=st.floats(0, 0.5),
)
def test_uneven_stages_and_slow_links(
    prefill: list[float], decode: list[float], link: float, growth: float
) -> None:
    """Decode may begin in the last stages' prefill, and the last block ends a pass later."""
    stages = [
        StageSeconds(prefill=p, decode=(d, d + growth, d + 2 * growth))
        for p, d in zip(prefill, decode, strict=False)
    ]
    links = [StageSeconds(prefill=5 * link, decode=(link,) * 3) for _ in stages[1:]]
    links.append(StageSeconds(prefill=0.0, decode=(link,) * 3))
    found, played_s = price_round(stages, links, PASSES), _played(stages, links, PASSES)
    one_pass = max(
        max(len(stages) * max(seconds), sum(seconds))
        for seconds in zip(*(server.decode for server in (*stages, *links)), strict=True)
    )
    assert abs(found.seconds - played_s) <= 2 * one_pass
    assert found.seconds == pytest.approx(played_s, rel=0.1)


def test_what_a_round_waits_for() -> None:
    stages, links = _servers(3, 1.0, 1.0), _servers(3, 0.0, 0.0)
    slow = StageSeconds(prefill=1.0, decode=(2.0,) * 3)
    assert price_round([stages[0], slow, stages[0]], links, PASSES).slowest == 1
    assert price_round(stages, [links[0], slow, links[0]], PASSES).slowest == 4
    # All together take longer than the slowest for each block.
    half = StageSeconds(prefill=0.0, decode=(0.9,) * 3)
    assert price_round(stages, [half] * 3, PASSES).slowest is None
    slow = StageSeconds(prefill=100.0, decode=(1.0,) * 3)
    found = price_round([stages[0], stages[0], slow], links, PASSES)
    assert (found.slowest, found.in_prefill) == (2, True)
