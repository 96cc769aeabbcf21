"""Attention to pages: each lane's result is that of ``decode_attention`` to its tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from profiles import kernels
from profiles.packing import Packing
from tests.covering import covering

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
PAGE = 32
# Key heads, group, elements of a key and of a value: whole vectors and parts, one query and many.
SHAPES = [(2, 4, 128, 128), (1, 1, 64, 64), (3, 8, 80, 80), (2, 3, 16, 16)]
# Of latent attention: heads in one part, and in several.
LATENT_SHAPES = [(1, 4, 36, 28), (1, 16, 576, 512), (1, 40, 288, 256)]
LENGTHS = [1, 31, 130, 32, 5, 65, 16, 97, 64]


@dataclass(kw_only=True)
class Lanes:
    """Lanes whose pages lie anywhere in a pool that is otherwise full of NaN."""

    q: torch.Tensor
    pool: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    voids: torch.Tensor
    contexts: list[torch.Tensor]
    group: int
    value_dim: int
    packing: Packing | None

    def attend(self, **how: Any) -> torch.Tensor:
        """Attend to all at once; returns [lanes, rows, group, value_dim]."""
        rows = self.pool.shape[1]
        out = self.q.new_full((len(self.q) * rows, self.group, self.value_dim), torch.nan)
        how |= {"tables": self.tables, "lengths": self.lengths, "packing": self.packing}
        kernels.paged_attention(self.q, self.pool, out, **how)
        by_lane: torch.Tensor = out.unflatten(0, (-1, rows))
        return by_lane

    def attend_alone(self, lane: int, *, has_voids: bool = False, **how: Any) -> torch.Tensor:
        """Attend to one lane's tokens; returns [rows, group, value_dim]."""
        rows, here = self.pool.shape[1], slice(lane, lane + 1)
        out = self.q.new_full((rows, self.group, self.value_dim), torch.nan)
        how |= {"void_slots": self.voids[here]} if has_voids else {}
        packing = self.packing
        kernels.decode_attention(self.q[here], self.contexts[lane], out, packing=packing, **how)
        return out


def make_lanes(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    bits: int | None = None,
    lengths: list[int] = LENGTHS,
    page: int = PAGE,
) -> Lanes:
    rows, group, head_dim, value_dim = shape
    vectors = 1 if value_dim < head_dim else 2
    packing = Packing(num_elements=head_dim, bits=bits, group_size=64) if bits else None
    width, stored = (packing.row_bytes, torch.uint8) if packing else (head_dim, dtype)
    counts = [-(-length // page) for length in lengths]
    numbers = torch.randperm(sum(counts) + 3, dtype=torch.int32)
    # The bytes of groups whose scales are NaN.
    poison = 0xFF if packing else torch.nan
    pool = torch.full((len(numbers), rows, vectors, page, width), poison, dtype=stored)
    # Behind a lane's last page no number is one.
    tables = torch.full((len(lengths), max(counts) + 1), -(2**30), dtype=torch.int32)
    contexts, first = [], 0
    for lane, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        plain = torch.randn(length * vectors, rows, head_dim).to(dtype)
        context = plain
        if packing is not None:
            context = torch.empty(length * vectors, rows, width, dtype=stored)
            kernels.pack_rows(plain, packing, context)
        context = context.unflatten(0, (length, vectors))
        tables[lane, :count] = numbers[first : first + count]
        for slot in range(length):
            pool[tables[lane, slot // page], :, :, slot % page] = context[slot].transpose(0, 1)
        contexts.append(context)
        first += count
    stacked = torch.randn(len(lengths), rows * (group + 2), head_dim).to(dtype)
    voids = torch.tensor([_void(length) for length in lengths], dtype=torch.int32)
    return Lanes(
        q=stacked[:, : rows * group],
        pool=pool,
        tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        voids=voids,
        contexts=contexts,
        group=group,
        value_dim=value_dim,
        packing=packing,
    )


def _void(length: int) -> tuple[int, int]:
    """Return the bounds of void slots that leave one at least; some wrap around."""
    seen = int(torch.randint(0, length, ()))
    first, end = sorted(int(bound) for bound in torch.randint(0, length + 1, (2,)))
    if first <= seen < end:
        return end, first
    return first, end


def _assert_equal_alone(lanes: Lanes, *, voids: bool = False, **how: Any) -> None:
    together = lanes.attend(voids=lanes.voids if voids else None, **how)
    for lane in range(len(lanes.q)):
        alone = lanes.attend_alone(lane, has_voids=voids, **how)
        assert alone.isfinite().all()
        assert torch.equal(together[lane], alone)


@covering(
    {
        "dtype": DTYPES,
        "shape": [*SHAPES, *LATENT_SHAPES],
        "bits": [None, 8, 4],
        "voids": [False, True],
    }
)
def test_a_lane_is_attended_as_if_alone(
    library: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    bits: int | None,
    voids: bool,
) -> None:
    lanes = make_lanes(shape, dtype, bits=bits)
    _assert_equal_alone(lanes, voids=voids, scale=0.07)


@covering(
    {
        "dtype": DTYPES,
        "shape": [SHAPES[0], SHAPES[2], LATENT_SHAPES[2]],
        "bits": [None, 4],
        "sparsity": [1.0, 0.3],
        "kind": ["soft_cap", "sinks", "slopes", "all"],
    }
)
def test_with_soft_caps_sinks_and_slopes(
    library: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    bits: int | None,
    sparsity: float,
    kind: str,
) -> None:
    lanes = make_lanes(shape, dtype, bits=bits)
    heads = lanes.q.shape[1]
    added: dict[str, Any] = {
        "soft_cap": 3.0,
        "sinks": torch.randn(heads),
        "slopes": torch.rand(heads),
    }
    how = added if kind == "all" else {kind: added[kind]}
    _assert_equal_alone(lanes, voids=True, sparsity=sparsity, **how)


def test_no_lanes_are_no_error(library: str) -> None:
    lanes = make_lanes(SHAPES[0], torch.bfloat16)
    lanes.q, lanes.tables, lanes.lengths = lanes.q[:0], lanes.tables[:0], lanes.lengths[:0]
    assert lanes.attend().shape[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_neither_order_nor_neighbours_change_a_bit(
    library: str, dtype: torch.dtype, bits: int | None
) -> None:
    lanes = make_lanes(SHAPES[0], dtype, bits=bits)
    whole = lanes.attend()
    order = lanes.lengths.argsort(descending=True).int()
    assert torch.equal(lanes.attend(order=order), whole)
    few = torch.tensor([7, 0, 4])
    lanes.q, lanes.tables, lanes.lengths = lanes.q[few], lanes.tables[few], lanes.lengths[few]
    assert torch.equal(lanes.attend(), whole[few])


def test_long_lanes_beside_short_ones_do_not_depend_on_threads() -> None:
    lanes = make_lanes(SHAPES[3], torch.bfloat16, lengths=[7, 4500, 1, 1500, 1500, 5000, 2])
    order = lanes.lengths.argsort(descending=True).int()
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results += [lanes.attend(), lanes.attend(order=order)]
    finally:
        torch.set_num_threads(threads)
    for lane in range(len(lanes.q)):
        alone = lanes.attend_alone(lane)
        assert all(torch.equal(together[lane], alone) for together in results)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], LATENT_SHAPES[2]])
def test_sums_of_values_follow_lanes_that_change_places(
    library: str, shape: tuple[int, int, int, int], bits: int | None
) -> None:
    """One lane begins at the second step, and the batch is in another order then."""
    lanes = make_lanes(shape, torch.bfloat16, bits=bits)
    rows, head_dim, places = shape[0], shape[2], torch.randperm(len(LENGTHS)).int()
    together = torch.full((len(places), rows, head_dim), torch.nan)
    alone = torch.full_like(together, torch.nan)
    contexts, ends = lanes.contexts, lanes.lengths
    for back in (2, 1, 0):
        # Lanes of one token have not begun before the last step.
        at_work = (torch.randperm(len(ends)) if back else torch.arange(len(ends))).tolist()
        at_work = [lane for lane in at_work if ends[lane] > back]
        begins = torch.tensor([back == 2 or int(ends[n]) == back + 1 for n in at_work])
        now = Lanes(
            q=lanes.q[at_work],
            pool=lanes.pool,
            tables=lanes.tables[at_work],
            lengths=ends[at_work] - back,
            voids=lanes.voids[at_work],
            contexts=[contexts[lane][: int(ends[lane]) - back] for lane in at_work],
            group=lanes.group,
            value_dim=lanes.value_dim,
            packing=lanes.packing,
        )
        out = now.attend(
            sparsity=0.2,
            value_sums=together,
            lanes=places[at_work],
            begins=begins.to(torch.uint8),
        )
        for i, lane in enumerate(at_work):
            expected = now.attend_alone(
                i, sparsity=0.2, value_sums=alone[lane], begins=bool(begins[i])
            )
            assert torch.equal(out[i], expected)
    if library != "twin":
        value = slice(0, lanes.value_dim)
        assert torch.equal(together[places.long()][..., value], alone[..., value])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_is_its_newest_tokens(library: str, dtype: torch.dtype) -> None:
    """Of pages that fill again and again, against a softmax over the window in float64."""
    window, ring, head_dim = 40, 64, 64
    pool = torch.full((5, 1, 2, PAGE, head_dim), torch.nan, dtype=dtype)
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    tokens = torch.randn(200, 2, head_dim).to(dtype)
    for number, token in enumerate(tokens):
        slot, count = number % ring, number + 1
        pool[table[0, slot // PAGE], 0, :, slot % PAGE] = token
        void = (count % ring, (count - window) % ring) if count > ring else (0, count - window)
        q = torch.randn(1, 2, head_dim).to(dtype)
        out = torch.empty(1, 2, head_dim, dtype=dtype)
        kernels.paged_attention(
            q,
            pool,
            out,
            tables=table,
            lengths=torch.tensor([min(count, ring)], dtype=torch.int32),
            voids=torch.tensor([void if count > window else (0, 0)], dtype=torch.int32),
        )
        keys, values = tokens[max(0, count - window) : count].double().unbind(1)
        shares = (q[0].double() @ keys.T / 8).softmax(-1)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out[0].double(), shares @ values, rtol=tolerance, atol=tolerance)
