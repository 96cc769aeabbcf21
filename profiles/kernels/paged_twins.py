"""Attention to a cache in pages in plain torch: a reference, and a fallback."""

from __future__ import annotations

from typing import Any

import torch

from profiles.kernels import twins
from profiles.kernels.carried_twins import Attended, attend
from profiles.packing import Packing


def paged_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    voids: torch.Tensor | None,
    carry: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    packing: Packing | None,
    sparsity: float,
) -> None:
    """See ``profiles.kernels.paged_attention``. Lane by lane, so that none changes another's
    result."""
    rows = pool.shape[1]
    if carry is not None:
        how: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "packing": packing}
        _attend_further(q, pool, out, tables, lengths, voids, carry, sinks, **how)
        return
    for lane, length in enumerate(lengths.tolist()):
        twins.decode_attention(
            q[lane : lane + 1],
            gathered(pool, tables[lane], length),
            out[lane * rows : (lane + 1) * rows],
            first_row=0,
            void_slots=None if voids is None else voids[lane : lane + 1],
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            slopes=slopes,
            packing=packing,
            sparsity=sparsity,
        )


def _attend_further(
    q: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    voids: torch.Tensor | None,
    carry: torch.Tensor,
    sinks: torch.Tensor | None,
    **how: Any,
) -> None:
    """Do the same after what each lane has attended to before."""
    by_lane = out.unflatten(0, (len(q), -1))
    for lane, length in enumerate(lengths.tolist()):
        void = None if voids is None else voids[lane]
        queries, kept = (x[lane].unflatten(0, by_lane.shape[1:3]) for x in (q, carry))
        context, value_dim = gathered(pool, tables[lane], length), out.shape[2]
        own = attend(queries, context, void=void, value_dim=value_dim, **how)
        by_lane[lane] = Attended.loaded(kept, value_dim, sinks).merged(own).mean


def prefix_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    kept: torch.Tensor,
    *,
    table: torch.Tensor,
    length: int,
    sinks: torch.Tensor | None,
    **how: Any,
) -> None:
    """See ``profiles.kernels.prefix_attention``; q is [1, heads, head_dim], and ``kept`` [rows,
    group, width] is filled."""
    queries = q[0].unflatten(0, kept.shape[:2])
    found = attend(queries, gathered(pool, table, length), void=None, **how)
    Attended.nothing(torch.zeros_like(found.sums), sinks).merged(found).store(kept)


def gathered(pool: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Copy a lane's tokens from its pages: [length, vectors, rows, width]."""
    page_tokens = pool.shape[3]
    pages = pool[table[: -(-length // page_tokens)].long()]
    return pages.permute(0, 3, 2, 1, 4).flatten(0, 1)[:length]
