"""The seconds of a pipeline against one that is played out, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.cluster.pipeline import price_round
from costmodel.pricing.passes import FloatArray

# A prefill, and segments of decode.
COUNTS = np.array([1.0, 8.0, 8.0, 15.0])


def _played(stages: Sequence[FloatArray], links: Sequence[FloatArray], counts: FloatArray) -> float:
    """Return the seconds until the last block has left the last stage for the last time.

    Every stage and every link takes the blocks one by one, in turns.
    """
    ring = [server for pair in zip(stages, links, strict=True) for server in pair]
    free, ready = [0.0] * len(ring), [0.0] * len(stages)
    end = 0.0
    for number in np.repeat(np.arange(len(counts)), counts.astype(int)):
        for block in range(len(stages)):
            now = ready[block]
            for place, server in enumerate(ring):
                now = free[place] = max(now, free[place]) + server[number]
                # The way back matters only to a pass that follows.
                if place == len(ring) - 2:
                    end = max(end, now)
            ready[block] = now
    return end


def _servers(count: int, prefill: float, decode: float) -> list[FloatArray]:
    return [np.array([prefill, decode, decode, decode])] * count


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_stages_without_a_network(count: int) -> None:
    """The last stage waits for the first block, takes all, and is never idle again."""
    stages, links = _servers(count, 3.0, 0.25), _servers(count, 0.0, 0.0)
    found = price_round(stages, links, COUNTS)
    assert found.prefill_s == pytest.approx((2 * count - 1) * 3.0)
    assert found.decode_s == pytest.approx(31 * count * 0.25)
    assert found.seconds == pytest.approx(_played(stages, links, COUNTS))


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
        np.array([p, d, d + growth, d + 2 * growth]) for p, d in zip(prefill, decode, strict=False)
    ]
    links = [np.array([5 * link, link, link, link]) for _ in stages[1:]]
    links.append(np.array([0.0, link, link, link]))
    found, played_s = price_round(stages, links, COUNTS), _played(stages, links, COUNTS)
    one_pass = max(
        max(len(stages) * max(seconds), sum(seconds))
        for seconds in np.stack([*stages, *links])[:, 1:].T.tolist()
    )
    assert abs(found.seconds - played_s) <= 2 * one_pass
    assert found.seconds == pytest.approx(played_s, rel=0.1)


def test_what_a_round_waits_for() -> None:
    stages, links = _servers(3, 1.0, 1.0), _servers(3, 0.0, 0.0)
    slow = np.array([1.0, 2.0, 2.0, 2.0])
    assert price_round([stages[0], slow, stages[0]], links, COUNTS).slowest == 1
    assert price_round(stages, [links[0], slow, links[0]], COUNTS).slowest == 4
    # All together take longer than the slowest for each block.
    half = np.array([0.0, 0.9, 0.9, 0.9])
    assert price_round(stages, [half] * 3, COUNTS).slowest is None
    slow = np.array([100.0, 1.0, 1.0, 1.0])
    found = price_round([stages[0], stages[0], slow], links, COUNTS)
    assert (found.slowest, found.in_prefill) == (2, True)
