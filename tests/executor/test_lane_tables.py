"""Rows of a pass, page tables and void slots, against what they say in words."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.plan.pages import PAGE, PoolSizes, ring_tokens
from costmodel.schedule.pass_lanes import LaneBatch
from executor.model.sampling import Sampler
from executor.run.lanes import Lane, LaneTable
from executor.run.pass_plan import PassPlan, void_slots
from executor.stores.page_runs import byte_runs

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


def test_pages_of_a_pass_are_those_before_it_and_those_that_it_fills() -> None:
    table = _table({3: _lane(70, generated=3), 1: _lane(30, generated=3)})
    PassPlan.of(0, [LaneBatch((3, 1), ())], table, chunk_rows=9)
    before = [{*table.pages(3)[ring], *table.pages(1)[ring]} for ring in range(2)]
    # Lane 1 goes on to its second page; its ring has room.
    table.lanes[1].length = 32
    table.admit(0, _lane(40))
    plan = PassPlan.of(1, [LaneBatch((3,), ()), LaneBatch((1,), ((0, 5),))], table, chunk_rows=9)
    held = [{page for lane in (3, 1, 0) for page in table.pages(lane)[ring]} for ring in range(2)]
    for ring, pages in enumerate(plan.pages):
        assert pages.present.tolist() == sorted(before[ring])
        assert pages.used.tolist() == sorted(held[ring])
        filled = {table.tables[ring][3, 72 // PAGE % (3, 2)[ring]], table.pages(1)[ring][1]}
        assert pages.written.tolist() == sorted(filled | {*table.pages(0)[ring]})
    freed = table.release([3])
    PassPlan.of(2, [LaneBatch((1,), ())], table, chunk_rows=9)
    # The pages that were freed are taken again, the first one first.
    table.make_room(1, 65)
    assert table.pages(1)[0][2] == min(freed[0])


@pytest.mark.parametrize(("page_bytes", "gap"), [(8192, 0), (4608, 0), (1152, 0), (4608, 9000)])
def test_runs_are_the_disk_pages_of_pages(page_bytes: int, gap: int) -> None:
    rng = random.Random(page_bytes)
    for _ in range(30):
        pages = np.array(sorted(rng.sample(range(60), rng.randint(0, 40))), np.int64)
        wanted = {
            block
            for page in pages.tolist()
            for block in range(page * page_bytes // 4096, -(-(page + 1) * page_bytes // 4096))
        }
        runs = byte_runs(pages, page_bytes, gap_bytes=gap)
        found = [b for run in runs for b in range(run.start // 4096, run.stop // 4096)]
        assert len(set(found)) == len(found) and wanted <= set(found)
        if not gap:
            assert wanted == set(found)
        assert all(b.start - a.stop > gap for a, b in pairwise(runs))
