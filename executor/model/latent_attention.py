"""Latent attention: keys and values of all heads from one short row of each token. No placement.

A row has the token's latent, normalised, then the key part with the token's position, rotated.
``kv_b`` has for each head the rows that make its keys of the latent, then those that make its
values. Prefill makes the keys and values of some heads at a time. Decode multiplies each query by
its head's key rows and attends to the cached rows. It multiplies the result by the head's value
rows. The outcome is the same, without a key or value of any cached token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from costmodel.model.attention_spec import AttentionSpec, LatentSpec
from costmodel.pricing.workspace import LATENT_HEADS_AT_ONCE
from executor.model.matrices import LayerWeights, Matrix, decode, linear, split_rows, vector
from executor.model.rotations import Rotation
from profiles import kernels


def project_latents(
    projected: torch.Tensor,
    weights: LayerWeights,
    rotation: Rotation,
    attention: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make queries and rows of what ``qkv`` makes of the hidden states.

    Parameters
    ----------
    projected
        [batch, tokens, ``qkv_size``]; changed.
    rotation
        See ``executor.model.projections.project_qkv``.

    Returns
    -------
    tuple of torch.Tensor
        Queries [batch, tokens, heads, key_dim], and rows [batch, tokens, row_dim].
    """
    latent, rotary = _latent(attention), attention.rotary
    assert rotary is not None
    queries, rows = projected.split(attention.qkv_parts, dim=-1)
    if latent.query_rank is not None:
        _norm(queries, weights, "q_a_norm", latent)
        queries = linear(queries, weights["q_b.weight"])
    _norm(rows[..., : latent.rank], weights, "kv_a_norm", latent)
    heads = queries.unflatten(-1, (attention.num_heads, latent.key_dim))
    parts = heads.flatten(0, 1)[..., latent.nope_dim :], rows.flatten(0, 1)[:, None, latent.rank :]
    for part in parts:
        kernels.rotate(part, *rotation, interleaved=rotary.is_interleaved)
    return heads, rows


def prefill_latents(
    queries: torch.Tensor,
    rows: torch.Tensor,
    weights: LayerWeights,
    attention: AttentionSpec,
    lengths: Sequence[int] | None = None,
    *,
    first_position: int = 0,
) -> torch.Tensor:
    """Attend causally within each prompt, with the results of ``project_latents``.

    On a CPU, queries may be those from ``first_position`` on, with the rows of all positions.

    Returns
    -------
    torch.Tensor
        [batch, tokens, heads * value_dim]; see ``prefill_attention`` for rows of padding, and for
        ``lengths``.

    Notes
    -----
    Temporaries at the peak beside the result, in elements per token and head of
    ``LATENT_HEADS_AT_ONCE``: ``nope_dim + value_dim`` (the product), and ``key_dim``; on a GPU at
    most four times the larger of ``key_dim`` and ``value_dim`` (keys, what is padded, and the
    result). On a CPU these tokens are those of the rows, and the keys are of one prompt.
    """
    latent = _latent(attention)
    out = queries.new_empty(*queries.shape[:3], latent.value_dim)
    for first, end in _tiles(attention.num_heads):
        chunks = _rows_of(weights["kv_b.weight"], latent, first, end)
        made = linear(rows[..., : latent.rank], chunks).unflatten(-1, (end - first, -1))
        heads = queries[:, :, first:end]
        if queries.is_cuda:
            out[:, :, first:end] = _attend_heads(heads, made, rows, attention)
            continue
        whole = [queries.shape[1]] * len(queries)
        for i, length in enumerate(whole if lengths is None else lengths):
            end_position = first_position + length
            kernels.prompt_attention(
                heads[i, :length],
                [_key_run(made[i, :end_position], rows[i, :end_position], latent)],
                out[i, :length, first:end],
                first_position=first_position,
                scale=attention.scale,
            )
            out[i, length:, first:end] = 0
    return out.flatten(2)


def _key_run(made: torch.Tensor, rows: torch.Tensor, latent: LatentSpec) -> kernels.KeyRun:
    """Return keys and values of some heads, of the products [tokens, heads, nope_dim + value_dim]
    and the rows [tokens, row_dim] of one prompt."""
    keys, values = made.split([latent.nope_dim, latent.value_dim], dim=-1)
    shared = rows[:, None, latent.rank :].expand(-1, keys.shape[1], -1)
    return kernels.KeyRun.of(torch.cat([keys, shared], dim=-1), values)


def _attend_heads(
    queries: torch.Tensor, made: torch.Tensor, rows: torch.Tensor, attention: AttentionSpec
) -> torch.Tensor:
    """Attend with some heads on a GPU; ``made`` [batch, tokens, heads, nope_dim + value_dim] has
    their keys without positions, and their values."""
    latent = _latent(attention)
    keys, values = made.split([latent.nope_dim, latent.value_dim], dim=-1)
    shared = rows[:, :, None, latent.rank :].expand(-1, -1, keys.shape[2], -1)
    keys = torch.cat([keys, shared], dim=-1)
    # Only for keys and values of one size does torch attend without making all scores at once.
    size = max(latent.key_dim, latent.value_dim)
    q, k, v = (
        (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))).transpose(1, 2)
        for x in (queries, keys, values)
    )
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
    return attended.transpose(1, 2)[..., : latent.value_dim]


def absorb_keys(
    queries: torch.Tensor, rows: torch.Tensor, weights: LayerWeights, attention: AttentionSpec
) -> torch.Tensor:
    """Multiply each query of decode by its head's key rows.

    Returns
    -------
    torch.Tensor
        Queries for cached rows, then the new row: [batch, 1, heads * row_dim + row_dim].

    Notes
    -----
    Temporaries at the peak beside the result, for ``LATENT_HEADS_AT_ONCE`` heads: the matrices
    where they are packed or cut, on the CPU their key rows transposed, and the operand and result
    of their product.
    """
    latent, batch = _latent(attention), len(queries)
    out = queries.new_empty(batch, attention.num_heads + 1, latent.row_dim)
    asked = queries[:, 0]
    for heads, matrices in _matrices_of(weights, attention, queries.dtype):
        keys = matrices[:, : latent.nope_dim].transpose(1, 2)
        out[:, heads, : latent.rank] = _by_head(asked[:, heads, : latent.nope_dim], keys)
    out[:, :-1, latent.rank :] = asked[..., latent.nope_dim :]
    out[:, -1] = rows[:, 0]
    return out.flatten(1)[:, None]


def make_values(
    attended: torch.Tensor, weights: LayerWeights, attention: AttentionSpec
) -> torch.Tensor:
    """Multiply the result of decode's attention, [batch, 1, heads * rank], by each head's value
    rows; returns [batch, 1, heads * value_dim]. Temporaries are those of ``absorb_keys``."""
    latent, batch = _latent(attention), len(attended)
    found = attended.view(batch, attention.num_heads, latent.rank)
    out = attended.new_empty(batch, attention.num_heads, latent.value_dim)
    for heads, matrices in _matrices_of(weights, attention, attended.dtype):
        out[:, heads] = _by_head(found[:, heads], matrices[:, latent.nope_dim :])
    return out.flatten(1)[:, None]


def _by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Multiply ``x`` [batch, heads, in] by a matrix of each head, [heads, out, in]; returns
    [batch, heads, out]."""
    batch, heads, _ = x.shape
    rows = x.transpose(0, 1)
    if x.is_cuda:
        return torch.bmm(rows, matrices.transpose(1, 2)).transpose(0, 1)
    # The CPU's kernel sums over neighbours in memory.
    dense = [matrix.contiguous() for matrix in matrices]
    made = kernels.grouped_linear(rows.flatten(0, 1), [batch] * heads, dense)
    return made.view(heads, batch, -1).transpose(0, 1)


def _latent(attention: AttentionSpec) -> LatentSpec:
    assert attention.latent is not None
    return attention.latent


def _norm(x: torch.Tensor, weights: LayerWeights, name: str, latent: LatentSpec) -> None:
    """Normalise ``x`` [batch, tokens, elements] in place."""
    rows = x.flatten(0, 1)[:, None]
    kernels.rms_norm(rows, vector(weights, f"{name}.weight"), latent.eps, rows)


def _tiles(num_heads: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of heads that are computed at once."""
    for first in range(0, num_heads, LATENT_HEADS_AT_ONCE):
        yield first, min(first + LATENT_HEADS_AT_ONCE, num_heads)


def _rows_of(chunks: Sequence[Matrix], latent: LatentSpec, first: int, end: int) -> list[Matrix]:
    """Return the rows of ``kv_b`` of some heads, in chunks."""
    size = latent.nope_dim + latent.value_dim
    return split_rows(split_rows(chunks, end * size)[0], first * size)[1]


def _matrices_of(
    weights: LayerWeights, attention: AttentionSpec, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield ranges of heads, each with its matrices [heads, nope_dim + value_dim, rank].

    What a placement cuts is put together, because a sum over a head's rows has no cut.
    """
    for first, end in _tiles(attention.num_heads):
        found = _rows_of(weights["kv_b.weight"], _latent(attention), first, end)
        parts = [_unpacked(chunk, dtype) for chunk in found]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield slice(first, end), whole.unflatten(0, (end - first, -1))


def _unpacked(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(matrix, torch.Tensor):
        return matrix
    whole = torch.empty(matrix.shape, dtype=dtype, device=matrix.rows.device)
    decode(matrix, whole)
    return whole
