"""Attention to a shared prefix and then to own pages: the result is that without a cut."""

from __future__ import annotations

from typing import Any

import torch

from profiles import kernels
from tests.covering import covering
from tests.profiles.test_paged_attention import (
    DTYPES,
    LATENT_SHAPES,
    PAGE,
    SHAPES,
    TOLERANCE,
    make_lanes,
)

# For each lane its prefix, and its tokens: with two prefixes, and with none.
PREFIXES = [0, 1, 0, None, 0, 0, 1, 0, None, 0, 0]
LENGTHS = [129, 65, 135, 3, 160, 200, 97, 128 + 16, 40, 129, 222]
PREFIX_TOKENS = [128, 64]


@covering(
    {
        "dtype": DTYPES,
        "shape": [*SHAPES, *LATENT_SHAPES],
        "bits": [None, 8, 4],
        "kind": ["plain", "sinks", "soft_cap"],
    }
)
def test_a_cut_changes_nothing(
    library: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    bits: int | None,
    kind: str,
) -> None:
    lanes = make_lanes(shape, dtype, bits=bits, lengths=LENGTHS)
    heads, head_dim = lanes.q.shape[1:]
    added: dict[str, Any] = {"sinks": torch.randn(heads), "soft_cap": 3.0}
    how = {"scale": 0.07} | ({kind: added[kind]} if kind in added else {})
    for prefix, tokens in enumerate(PREFIX_TOKENS):
        first, *others = (lane for lane, p in enumerate(PREFIXES) if p == prefix)
        lanes.tables[others, : tokens // PAGE] = lanes.tables[first, : tokens // PAGE]
    expected = lanes.attend(**how)

    carry = torch.zeros(len(LENGTHS), heads, kernels.carry_width(head_dim))
    for prefix, tokens in enumerate(PREFIX_TOKENS):
        here = [lane for lane, p in enumerate(PREFIXES) if p == prefix]
        carry[here] = kernels.prefix_attention(
            lanes.q[here],
            lanes.pool,
            table=lanes.tables[here[0], : tokens // PAGE],
            length=tokens,
            value_dim=lanes.value_dim,
            packing=lanes.packing,
            **how,
        )
        lanes.lengths[here] -= tokens
        lanes.tables[here] = lanes.tables[here].roll(-(tokens // PAGE), dims=1)
    cut = lanes.attend(carry=carry, **how)
    if library == "twin":
        tolerance = max(1e-5, TOLERANCE[dtype])
        torch.testing.assert_close(cut, expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(cut, expected)


def test_no_lanes_have_no_carry(library: str) -> None:
    lanes = make_lanes(SHAPES[0], torch.bfloat16)
    table = lanes.tables[2, :2].contiguous()
    carried = kernels.prefix_attention(lanes.q[:0], lanes.pool, table=table, length=64)
    assert carried.shape == (0, lanes.q.shape[1], kernels.carry_width(128))
