"""Rows of a pass, page tables and void slots, against what they say in words."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.plan.pages import PAGE, PoolSizes, ring_tokens
from costmodel.schedule.pass_lanes import LaneBatch
from executor.model.sampling import Sampler
from executor.run.lanes import Lane, LaneTable
from executor.run.pass_plan import PassPlan, void_slots

POOL = PoolSizes(pages=(40, 16), most_pages=(None, 2))


def _lane(length: int, *, max_tokens: int = 9, generated: int = 0) -> Lane:
    prompt = np.arange(length) + 1000 * length
    lane = Lane(request=length, prompt=prompt, max_tokens=max_tokens, chooser=Sampler())
    lane.generated = list(range(generated))
    lane.length = length + generated - 1 if generated else 0
    return lane


def _table(lanes: dict[int, Lane]) -> LaneTable:
    table = LaneTable(POOL, most_lanes=8, most_tokens=200)
    for number, lane in lanes.items():
        table.admit(number, lane)
        if lane.generated:
            table.make_room(number, lane.length)
    return table


def test_pages_belong_to_one_lane_until_it_ends() -> None:
    table, rng = LaneTable(POOL, most_lanes=8, most_tokens=200), random.Random(4)
    sizes: dict[int, int] = {}
    for _ in range(300):
        number = rng.randrange(8)
        if number in sizes and rng.random() < 0.3:
            expected = [list(pages) for pages in table.pages(number)]
            assert table.release([number]) == expected
            del sizes[number]
            continue
        if number not in sizes:
            table.admit(number, _lane(1))
            sizes[number] = 0
        sizes[number] = min(150, sizes[number] + rng.randrange(30))
        table.make_room(number, sizes[number])
        held = [[table.pages(n)[ring] for n in sizes] for ring in range(2)]
        for ring, lists in enumerate(held):
            pages = [page for one in lists for page in one]
            assert len(set(pages)) == len(pages) and set(pages) <= set(range(POOL.pages[ring]))
        for n, size in sizes.items():
            assert tuple(map(len, table.pages(n))) == POOL.needed(size)
            for ring, pages in enumerate(table.pages(n)):
                assert table.tables[ring][n, : len(pages)].tolist() == pages


@pytest.mark.parametrize(("chunk_rows", "chunks"), [(1, 13), (5, 3), (8, 2), (50, 1)])
def test_rows_are_those_of_decode_and_then_of_prompts(chunk_rows: int, chunks: int) -> None:
    lanes = {3: _lane(70, generated=3), 1: _lane(4, generated=1)}
    prompts = {0: _lane(5), 6: _lane(6), 2: _lane(1, max_tokens=1)}
    table = _table(lanes | prompts)
    batch = LaneBatch((3, 1), ((0, 5), (6, 6), (2, 1)))
    plan = PassPlan.of(7, [LaneBatch((), ()), batch], table, chunk_rows=chunk_rows)
    empty, found = plan.batches
    assert len(empty) == 0 and plan.first_rows == (0, 0, 14)
    assert found.ids.tolist() == [2, 0, *range(5000, 5005), *range(6000, 6006), 1000]
    assert found.positions.tolist() == [72, 4, *range(5), *range(6), 0]
    assert found.most_positions.tolist() == [78, 12, *[13] * 5, *[14] * 6, 1]
    assert found.emit_rows.tolist() == [0, 1, 6, 12, 13]
    assert found.emit_lanes == (3, 1, 0, 6, 2)
    assert found.begins.tolist() == [0, 1] and found.order.tolist() == [0, 1]
    assert [(part.lane, part.rows) for part in found.prompts] == [
        (0, slice(2, 7)),
        (6, slice(7, 13)),
        (2, slice(13, 14)),
    ]
    assert len(found.chunks) == chunks
    rows = [row for chunk in found.chunks for row in range(14)[chunk.rows]]
    assert rows == list(range(14))
    emits = [c.rows.start + row for c in found.chunks for row in c.emit_rows.tolist()]
    assert emits == found.emit_rows.tolist()
    for prompt in found.prompts:
        parts = [part for c in found.chunks for part in c.prompts if part.lane == prompt.lane]
        assert [part.is_first for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
        positions = [part.first_position + i for part in parts for i in range(part.num_tokens)]
        assert positions == list(range(prompt.num_tokens))
    # A prompt whose one token ends it caches nothing.
    assert [len(pages) for pages in table.pages(2)] == [0, 0]
    whole, ring = found.slots
    assert whole.lengths.tolist() == [73, 5] and ring.lengths.tolist() == [64, 5]
    assert whole.offsets.tolist() == [72 % PAGE, 4] and ring.offsets.tolist() == [72 % PAGE, 4]
    assert whole.pages[0] == table.pages(3)[0][2] and ring.pages[0] == table.pages(3)[1][0]


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("window", [1, 5, 20, PAGE, PAGE + 9, 2 * PAGE])
def test_void_slots_hold_what_a_query_does_not_see(window: int, *, is_chunked: bool) -> None:
    ring = ring_tokens(window)
    assert ring is not None
    pool = PoolSizes(pages=(40,), most_pages=(ring // PAGE,))
    spec = AttentionSpec(
        num_heads=1, num_kv_heads=1, head_dim=2, window=window, is_chunked=is_chunked
    )
    for last in range(1, 3 * ring + 2):
        table = LaneTable(pool, most_lanes=1, most_tokens=5 * ring)
        table.admit(0, _lane(last, generated=1))
        (batch,) = PassPlan.of(0, [LaneBatch((0,), ())], table, chunk_rows=1).batches
        found = void_slots(batch, spec, ring)
        assert found is not None and found.dtype == torch.int32
        first, end = found[0].tolist()
        used = int(batch.slots[0].lengths[0])
        inside = [first <= s < end if first <= end else not end <= s < first for s in range(used)]
        # The token at each slot is the newest of its position modulo the ring.
        newest = {position % ring: position for position in range(last + 1)}
        seen = last - last % window if is_chunked else last - window + 1
        assert inside == [newest[slot] < seen for slot in range(used)], last
