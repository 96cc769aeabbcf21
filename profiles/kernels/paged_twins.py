"""Attention to a cache in pages in plain torch: a reference, and a fallback."""

from __future__ import annotations

import torch

from profiles.kernels import twins
from profiles.packing import Packing


def paged_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    voids: torch.Tensor | None,
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


def gathered(pool: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Copy a lane's tokens from its pages: [length, vectors, rows, width]."""
    page_tokens = pool.shape[3]
    pages = pool[table[: -(-length // page_tokens)].long()]
    return pages.permute(0, 3, 2, 1, 4).flatten(0, 1)[:length]
