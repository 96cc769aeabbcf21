"""Attention of prefill (``profiles.kernels`` has that of decode). No placement.

Prompts of different lengths are padded on the right to the longest: sequence ``i`` has its prompt
in tokens ``[0, length_i)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from costmodel.model.attention_spec import AttentionSpec
from costmodel.pricing.workspace import KEYS_AT_ONCE, QUERIES_AT_ONCE
from executor.model.alibi import slopes_of
from profiles import kernels


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: AttentionSpec,
    sinks: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attend causally within each prompt.

    Parameters
    ----------
    q
        [batch, tokens, heads, head_dim], any strides.
    k, v
        [batch, tokens, kv heads, head_dim].
    attention
        Its window, soft cap and ALiBi slopes are applied.
    sinks
        Of each query head, float32 [heads].
    lengths
        Tokens of each prompt; ``None`` where none is padded. On a CPU the result for a prompt is
        then the one that it has alone.

    Returns
    -------
    torch.Tensor
        [batch, tokens, heads * head_dim]. Rows of padding have no meaning, but are finite where
        ``q``, ``k`` and ``v`` are. Causal attention never reads them for a row of a prompt, because
        they are to its right.
    """
    if q.is_cuda:
        return attend_on_gpu(q, k, v, attention, sinks)
    out = q.new_empty(q.shape)
    for i, length in enumerate([q.shape[1]] * len(q) if lengths is None else lengths):
        run = kernels.KeyRun.of(k[i, :length], v[i, :length])
        attend_runs(q[i, :length], [run], out[i, :length], attention, sinks)
        out[i, length:] = 0
    return out.flatten(2)


def attend_runs(
    q: torch.Tensor,
    runs: Sequence[kernels.KeyRun],
    out: torch.Tensor,
    attention: AttentionSpec,
    sinks: torch.Tensor | None,
    *,
    first_position: int = 0,
    first_key: int = 0,
) -> None:
    """Attend with tokens of one sequence as ``attention`` says (see ``kernels.prompt_attention``
    for the parameters)."""
    kernels.prompt_attention(
        q,
        runs,
        out,
        first_position=first_position,
        first_key=first_key,
        window=attention.window,
        is_chunked=attention.is_chunked,
        soft_cap=attention.soft_cap,
        sinks=sinks,
        slopes=slopes_of(attention, q.device),
    )


def attend_on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Do the same by torch's kernels, all prompts being of the longest one's length.

    Notes
    -----
    Works sequence by sequence where torch's kernel does not support grouped heads (in float32). The
    heads of a group then share one key as a view; with a batch dimension, the keys would be
    repeated in memory. Temporaries beside the result: the result of one sequence, [heads, tokens,
    head_dim]; with a window or another softmax those of one tile of queries, which
    ``costmodel.pricing.workspace`` counts.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    is_whole = attention.has_plain_softmax and not _has_window(attention, tokens)
    if is_whole and q.is_cuda and (heads == kv_heads or _knows_groups(q)):
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=heads != kv_heads,
        )
        return attended.transpose(1, 2).flatten(2)
    out = q.new_empty(batch, tokens, heads, head_dim)
    split = batch, tokens, kv_heads, heads // kv_heads, head_dim
    queries, found = (x.view(split).permute(0, 2, 3, 1, 4) for x in (q, out))
    for i in range(batch):
        keys, values = k[i].transpose(0, 1), v[i].transpose(0, 1)
        _attend_sequence(queries[i], keys, values, found[i], attention, sinks)
    return out.flatten(2)


def _has_window(attention: AttentionSpec, tokens: int) -> bool:
    """Whether a window hides anything of so many tokens."""
    return attention.window is not None and attention.window < tokens


def _knows_groups(q: torch.Tensor) -> bool:
    """Whether torch's flash attention, the only kernel with grouped heads, takes this tensor."""
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _attend_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    attention: AttentionSpec,
    sinks: torch.Tensor | None,
) -> None:
    """Attend with [kv heads, group, tokens, head_dim] to [kv heads, tokens, head_dim]."""
    tokens = q.shape[2]
    if attention.has_plain_softmax and not _has_window(attention, tokens):
        keys, values = (x[:, None].expand(q.shape) for x in (k, v))
        out.copy_(F.scaled_dot_product_attention(q, keys, values, is_causal=True))
        return
    for first in range(0, tokens, QUERIES_AT_ONCE):
        end = min(first + QUERIES_AT_ONCE, tokens)
        begin = _first_seen(attention, first)
        queries, seen = q[:, :, first:end], slice(begin, end)
        if attention.has_plain_softmax:
            part = _attend_plainly(queries, k[:, seen], v[:, seen], attention)
        else:
            part = _attend_by_tiles(queries, k[:, seen], v[:, seen], attention, sinks)
        out[:, :, first:end].copy_(part)


def _attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: AttentionSpec
) -> torch.Tensor:
    """Attend with the queries [kv heads, group, queries, head_dim] of the last tokens to the keys
    and values [kv heads, tokens, head_dim] that one of them sees."""
    keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = _visible(q.shape[2], slice(0, k.shape[1]), k.shape[1], attention, q.device)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def _attend_by_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Do the same with a soft cap, sinks and ALiBi, one tile of keys at a time.

    Where a tile has a score that exceeds all before it, what was summed is fitted to it.
    """
    kv_heads, group, count, head_dim = q.shape
    shape = kv_heads, group, count
    queries = q.reshape(kv_heads, group * count, head_dim)
    largest = q.new_full(shape, -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(largest)
    if sinks is not None:
        # A sink is the first score, and adds nothing to the values.
        largest.copy_(sinks.view(kv_heads, group, 1))
        total.fill_(1)
    slopes = slopes_of(attention, q.device)
    sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for tile in _key_tiles(k.shape[1]):
        scores = (queries @ k[:, tile].transpose(1, 2)).view(*shape, -1).float()
        scores *= head_dim**-0.5
        if attention.soft_cap is not None:
            scores.div_(attention.soft_cap).tanh_().mul_(attention.soft_cap)
        if slopes is not None:
            # Counted from the last key for all queries: the shift cancels out in the softmax.
            places = torch.arange(tile.start, tile.stop, device=q.device) - (k.shape[1] - 1)
            scores += slopes.view(kv_heads, group, 1, 1) * places
        visible = _visible(count, tile, k.shape[1], attention, q.device)
        scores.masked_fill_(~visible, -torch.inf)
        now = torch.maximum(largest, scores.amax(-1))
        shares, kept = scores.sub_(now[..., None]).exp_(), (largest - now).exp_()
        total = total.mul_(kept).add_(shares.sum(-1))
        added = shares.view(kv_heads, group * count, -1).to(v.dtype) @ v[:, tile]
        sums.mul_(kept[..., None]).add_(added.view(q.shape))
        largest = now
        # Before the next tile's are made.
        del scores, shares, added
    return sums.div_(total[..., None])


def _key_tiles(num_keys: int) -> Iterator[slice]:
    """Yield tiles of keys, the last first: every query sees one of its keys, itself."""
    for end in range(num_keys, 0, -KEYS_AT_ONCE):
        yield slice(max(0, end - KEYS_AT_ONCE), end)


def _first_seen(attention: AttentionSpec, query: int) -> int:
    """Return the first key that a query sees, by their positions."""
    if attention.window is None:
        return 0
    if attention.is_chunked:
        return query - query % attention.window
    return max(0, query - attention.window + 1)


def _visible(
    num_queries: int, tile: slice, num_keys: int, attention: AttentionSpec, device: torch.device
) -> torch.Tensor:
    """Return which keys of a tile the last ``num_queries`` of ``num_keys`` tokens see, bool
    [queries, keys].

    Keys are counted from a multiple of the window where it is that of chunks.
    """
    keys = torch.arange(tile.start, tile.stop, device=device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    visible = keys <= queries
    window = attention.window
    if window is None:
        return visible
    if attention.is_chunked:
        return visible & (keys >= queries - queries % window)
    return visible & (keys > queries - window)
