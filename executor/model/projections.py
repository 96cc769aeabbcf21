"""A decoder layer up to its attention, and what is made of the result. No placement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from executor.model import latent_attention
from executor.model.matrices import LayerWeights, bias_of, linear, vector
from executor.model.norms import norm, normed_input
from executor.model.prefill_attention import attend_runs, prefill_attention
from executor.model.rotations import Rotation
from profiles import kernels


def project_prompt(
    x: torch.Tensor, weights: LayerWeights, rotation: Rotation | None, layer: LayerSpec
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run a layer of prefill up to its attention (see ``project_qkv`` for the parameters).

    Returns
    -------
    tuple
        Queries [batch, tokens, heads, head_dim], and the vectors to cache, [batch, tokens, kv
        heads, head_dim] each: keys and values, or of latent attention the rows.
    """
    attention = layer.attention
    if attention.latent is None:
        q, k, v = split_heads(project_qkv(x, weights, rotation, layer), attention)
        return q, (k, v)
    queries, rows = _project_latents(x, weights, rotation, layer)
    return queries, (rows[:, :, None],)


def attend_prompt(
    queries: torch.Tensor,
    cached: tuple[torch.Tensor, ...],
    weights: LayerWeights,
    attention: AttentionSpec,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attend within prompts, with the results of ``project_prompt``; returns [batch, tokens,
    ``output_size``]. ``lengths`` are those of ``prefill_attention``."""
    if attention.latent is None:
        keys, values = cached
        sinks = sinks_of(weights, attention)
        return prefill_attention(queries, keys, values, attention, sinks, lengths)
    (rows,) = cached
    return latent_attention.prefill_latents(queries, rows[:, :, 0], weights, attention, lengths)


def attend_part(
    queries: torch.Tensor,
    runs: Sequence[kernels.KeyRun],
    weights: LayerWeights,
    attention: AttentionSpec,
    *,
    first_position: int,
    first_key: int,
) -> torch.Tensor:
    """Attend with a part of one prompt, on a CPU. Its result is that of the whole prompt, in all
    bits.

    Parameters
    ----------
    queries
        Of adjacent positions, [tokens, heads, head_dim].
    runs
        Keys and values of these and of the positions before; of latent attention the rows as both,
        [tokens, 1, row_dim].
    first_position, first_key
        The positions of the first query and of the first key.

    Returns
    -------
    torch.Tensor
        [tokens, ``output_size``].
    """
    if attention.latent is None:
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        attend_runs(
            queries,
            runs,
            out,
            attention,
            sinks_of(weights, attention),
            first_position=first_position,
            first_key=first_key,
        )
        return out.flatten(1)
    assert first_key == 0
    parts = [run.gathered_keys() for run in runs]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return latent_attention.prefill_latents(
        queries[None], rows[None, :, 0], weights, attention, first_position=first_position
    )[0]


def project_token(
    x: torch.Tensor, weights: LayerWeights, rotation: Rotation | None, layer: LayerSpec
) -> torch.Tensor:
    """Run a layer of decode up to its attention (see ``project_qkv`` for the parameters).

    Returns
    -------
    torch.Tensor
        Queries and the vectors to cache, [batch, 1, ``query_size + cached_size``].
    """
    attention = layer.attention
    if attention.latent is None:
        return project_qkv(x, weights, rotation, layer)
    queries, rows = _project_latents(x, weights, rotation, layer)
    return latent_attention.absorb_keys(queries, rows, weights, attention)


def decode_queries(
    queries: torch.Tensor,
    cached: tuple[torch.Tensor, ...],
    weights: LayerWeights,
    attention: AttentionSpec,
) -> torch.Tensor:
    """Return the queries of decode, [batch, heads, head_dim], of the results of ``project_prompt``
    for one token of each sequence."""
    if attention.latent is None:
        return queries[:, 0]
    (rows,) = cached
    absorbed = latent_attention.absorb_keys(queries, rows[:, :, 0], weights, attention)
    return absorbed.view(len(queries), -1, attention.head_dim)[:, : attention.num_heads]


def make_values(
    attended: torch.Tensor, weights: LayerWeights, attention: AttentionSpec
) -> torch.Tensor:
    """Return the input of the output projection, [batch, 1, ``output_size``], of the result of
    decode's attention, [batch, 1, ``attended_size``]."""
    if attention.latent is None:
        return attended
    return latent_attention.make_values(attended, weights, attention)


def _project_latents(
    x: torch.Tensor, weights: LayerWeights, rotation: Rotation | None, layer: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    assert rotation is not None
    projected = _projected(x, weights, layer)
    return latent_attention.project_latents(projected, weights, rotation, layer.attention)


def _projected(x: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> torch.Tensor:
    """Normalise ``x`` and multiply it by ``qkv``; the norm is freed after the product."""
    normed = normed_input(x, weights, "attention", layer)
    return linear(normed, weights["qkv.weight"], bias_of(weights, "qkv"))


def project_qkv(
    x: torch.Tensor,
    weights: LayerWeights,
    rotation: Rotation | None,
    layer: LayerSpec,
) -> torch.Tensor:
    """Normalise, project and rotate: a decoder layer up to grouped-query attention.

    Parameters
    ----------
    x
        Hidden states [batch, tokens, hidden]; not changed.
    rotation
        The rotation of all tokens, sequence by sequence, or of one sequence where all have the same
        positions; with a temperature instead, the factors of queries. ``None`` for attention
        without either.

    Returns
    -------
    torch.Tensor
        Queries, keys and values, [batch, tokens, query + 2 * kv]; see ``split_heads``.

    Notes
    -----
    Temporaries at the peak are the largest of these, in elements per token, with ``qkv = query + 2
    * kv``:

    - norm: ``hidden`` and a float32 ``hidden``;
    - norm and product: ``hidden + qkv``;
    - rotation: ``qkv + query``;
    - norms of queries: ``qkv + query`` and a float32 ``query``, or ``qkv`` and two float32
      ``query`` where their weights are plus one or absent.

    ``qkv`` is held on return. Matrix products in bfloat16 on the CPU take a few MiB of scratch for
    themselves.
    """
    qkv = _projected(x, weights, layer)
    attention = layer.attention
    if attention.clip is not None:
        qkv.clamp_(-attention.clip, attention.clip)
    heads = qkv.view(-1, attention.num_heads + 2 * attention.num_kv_heads, attention.head_dim)
    if not attention.norms_rotated:
        _norm_queries(heads, weights, layer)
    if attention.rotary is not None and rotation is not None:
        rotated = heads[:, : attention.num_heads + attention.num_kv_heads]
        kernels.rotate(rotated, *rotation[:2], interleaved=attention.rotary.is_interleaved)
    if attention.temperature_floor is not None and rotation is not None:
        factors = rotation[-1]
        queries = heads[:, : attention.num_heads].unflatten(0, (-1, len(factors)))
        queries.mul_(factors[:, None, None])
    if attention.norms_rotated:
        _norm_queries(heads, weights, layer)
    if attention.scale is not None:
        # Kernels of attention always scale by ``head_dim ** -0.5``.
        heads[:, : attention.num_heads].mul_(attention.scale * attention.head_dim**0.5)
    return qkv


def _norm_queries(heads: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> None:
    """Normalise queries and keys [tokens, heads, head_dim] in place, as the layer's spec says."""
    attention = layer.attention
    if attention.qk_norm == "none":
        return
    queries, keys = heads[:, : attention.num_heads + attention.num_kv_heads].split(
        [attention.num_heads, attention.num_kv_heads], dim=1
    )
    spec = layer.query_norm
    for part, name in ((queries, "q_norm"), (keys, "k_norm")):
        rows = part.flatten(1)[:, None] if attention.qk_norm == "projection" else part
        if attention.qk_norm == "heads":
            _norm_heads(rows, weights, name, spec)
        elif spec.kind == "rms" and spec.has_weight and not spec.adds_one:
            kernels.rms_norm(rows, vector(weights, f"{name}.weight"), spec.eps, rows)
        else:
            rows.copy_(norm(rows, weights, name, spec))


def _norm_heads(rows: torch.Tensor, weights: LayerWeights, name: str, spec: NormSpec) -> None:
    """Normalise heads [tokens, heads, head_dim] in place, each with weights of its own."""
    for head, weight in enumerate(vector(weights, f"{name}.weight").view(rows.shape[1:])):
        part = rows[:, head]
        part.copy_(F.layer_norm(part, weight.shape, weight, None, spec.eps))


def split_heads(
    qkv: torch.Tensor, attention: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [..., heads, head_dim], keys and values [..., kv heads, head_dim] as views of
    all [..., query + 2 * kv]."""
    heads = qkv.unflatten(-1, (-1, attention.head_dim))
    kv_heads = attention.num_kv_heads
    q, k, v = heads.split([attention.num_heads, kv_heads, kv_heads], dim=-2)
    return q, k, v


def sinks_of(weights: LayerWeights, attention: AttentionSpec) -> torch.Tensor | None:
    """Return the sinks of a layer's query heads, float32 [heads]; ``None`` without any."""
    return vector(weights, "attention.sinks") if attention.has_sinks else None
