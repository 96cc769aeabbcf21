"""Attention of prompts in plain torch: a reference, and a fallback.

torch chooses a kernel by the shapes of a product, and each sums in an order of its own. So queries
are taken in blocks of one size that begin at multiples of it, and keys in tiles: a token's result
depends neither on those beside it, nor on how a prompt is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Positions of a block of queries, and of a tile of keys.
BLOCK, TILE = 64, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Softmax:
    """What is done between scores and shares; sinks and slopes are [kv heads, 1, group]."""

    window: int | None
    is_chunked: bool
    scale: float
    soft_cap: float | None
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None

    def first_seen(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the first position that is seen from each."""
        if self.window is None:
            return torch.zeros_like(positions)
        if self.is_chunked:
            return positions - positions % self.window
        return (positions - self.window + 1).clamp(min=0)


def prompt_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    first_position: int,
    first_key: int,
    window: int | None,
    is_chunked: bool,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> None:
    """See ``profiles.kernels.prompt_attention``; keys and values are in one run."""
    kv_heads = keys.shape[1]
    softmax = _Softmax(
        window=window,
        is_chunked=is_chunked,
        scale=scale,
        soft_cap=soft_cap,
        sinks=None if sinks is None else sinks.view(kv_heads, 1, -1),
        slopes=None if slopes is None else slopes.view(kv_heads, 1, -1),
    )
    end = first_position + len(q)
    for block in range(first_position - first_position % BLOCK, end, BLOCK):
        begin, stop = max(block, first_position), min(block + BLOCK, end)
        here = slice(begin - first_position, stop - first_position)
        queries = _padded(q[here], begin - block, BLOCK)
        found = _attend_block(queries, block, keys, values, first_key, softmax)
        out[here] = found[begin - block : stop - block]


def _padded(tokens: torch.Tensor, before: int, size: int) -> torch.Tensor:
    """Return ``tokens`` [tokens, heads, elements] as float32 among zeros, ``size`` in all."""
    return F.pad(tokens.float(), (0, 0, 0, 0, before, size - before - len(tokens)))


def _attend_block(
    queries: torch.Tensor,
    block: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_key: int,
    softmax: _Softmax,
) -> torch.Tensor:
    """Attend with [BLOCK, heads, head_dim] from position ``block`` on, tile by tile; returns
    [BLOCK, heads, value_dim]."""
    kv_heads = keys.shape[1]
    by_head = queries.unflatten(1, (kv_heads, -1)).transpose(0, 1)
    shape = by_head.shape[:3]
    positions = torch.arange(block, block + BLOCK, device=queries.device)
    first_seen = softmax.first_seen(positions)
    largest = torch.full(shape, -torch.inf, device=queries.device)
    total = torch.zeros_like(largest)
    if softmax.sinks is not None:
        # A sink is the first score, and adds nothing to the values.
        largest, total = softmax.sinks.expand(shape), torch.ones_like(total)
    sums = torch.zeros(*shape, values.shape[2], device=queries.device)
    first = max(int(first_seen[0]), first_key)
    for tile in range(first - first % TILE, block + BLOCK, TILE):
        begin, end = max(tile, first_key), min(tile + TILE, first_key + len(keys))
        here = slice(begin - first_key, end - first_key)
        k, v = (_padded(x[here], begin - tile, TILE).transpose(0, 1) for x in (keys, values))
        places = torch.arange(tile, tile + TILE, device=queries.device)
        seen = (places <= positions[:, None]) & (places >= first_seen[:, None])
        distances = (places - positions[:, None])[:, None].float()
        scores = (by_head.flatten(1, 2) @ k.transpose(1, 2)).view(*shape, TILE) * softmax.scale
        if softmax.soft_cap is not None:
            scores = softmax.soft_cap * (scores / softmax.soft_cap).tanh()
        if softmax.slopes is not None:
            scores = scores + softmax.slopes[..., None] * distances
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        now = torch.maximum(largest, scores.amax(-1))
        # Nothing was seen yet where the maximum is still minus infinity.
        origin = now.masked_fill(now == -torch.inf, 0)
        shares, kept = (scores - origin[..., None]).exp(), (largest - origin).exp()
        total = total * kept + shares.sum(-1)
        sums = sums * kept[..., None] + (shares.flatten(1, 2) @ v).view(sums.shape)
        largest = now
    # Rows of padding may have seen nothing.
    mean = sums / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return mean.transpose(0, 1).flatten(1, 2)
