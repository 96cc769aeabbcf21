"""The decoder's arithmetic, one half layer at a time. Pure tensor maths: no placement.

Weights come as row chunks, because a placement may cut a matrix between two rows. The results do
not depend on the cuts. They are rounded at the same points as in transformers' modules, so that the
logits are equal.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from costmodel.model.layer_spec import AttentionSpec, LayerSpec, NormSpec
from costmodel.model.spec import HeadSpec
from executor.model import latent_attention, mlp
from executor.model.experts import Routing, experts_output, route
from executor.model.matrices import LayerWeights, add_linear, bias_of, linear, vector
from executor.model.prefill_attention import prefill_attention
from executor.model.rotations import Rotation
from profiles import kernels


def norm(x: torch.Tensor, weights: LayerWeights, name: str, spec: NormSpec) -> torch.Tensor:
    """Normalise ``x`` [..., hidden] as ``spec`` says."""
    if spec.kind == "none":
        return x.clone()
    weight = vector(weights, f"{name}.weight") if spec.has_weight else None
    if spec.kind == "layer":
        weight = weight + 1 if spec.adds_one and weight is not None else weight
        return F.layer_norm(x, (x.shape[-1],), weight, bias_of(weights, name), spec.eps)
    if spec.adds_one or weight is None:
        return _plus_one_norm(x, weight, spec.eps)
    return rms_norm(x, weight, spec.eps)


def _plus_one_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Divide ``x`` [..., n] by its root mean square, and scale by ``weight`` plus one, in float32.

    Temporaries at the peak: two float32 copies of ``x``.
    """
    wide = F.rms_norm(x.float(), (x.shape[-1],), eps=eps)
    if weight is not None:
        wide *= weight.float() + 1
    return wide.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide ``x`` [..., hidden] by its root mean square, and scale by ``weight``.

    Temporaries at the peak: the result; without native kernels a float32 copy of ``x`` too.
    """
    out = torch.empty_like(x)
    kernels.rms_norm(x.view(-1, 1, x.shape[-1]), weight, eps, out.view(-1, 1, x.shape[-1]))
    return out


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
) -> torch.Tensor:
    """Attend within prompts, with the results of ``project_prompt``; returns [batch, tokens,
    ``output_size``]."""
    if attention.latent is None:
        keys, values = cached
        return prefill_attention(queries, keys, values, attention, sinks_of(weights, attention))
    (rows,) = cached
    return latent_attention.prefill_latents(queries, rows[:, :, 0], weights, attention)


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
    normed = _normed_input(x, weights, "attention", layer)
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
    Temporaries at the peak, in elements per token and ``qkv = query + 2 * kv``: the largest of
    ``hidden + qkv`` (norm and product), ``hidden`` and a float32 ``hidden`` (norm), ``qkv +
    query`` (rotation), and with norms of queries ``qkv + query`` and a float32 ``query``. ``qkv``
    is held on return. Matrix products in bfloat16 on the CPU take a few MiB of scratch for
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
        kernels.rotate(rotated, *rotation, interleaved=attention.rotary.is_interleaved)
    if attention.temperature_floor is not None and rotation is not None:
        factors = rotation[0]
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


def finish_attention(
    x: torch.Tensor, attended: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Project the attention's output [batch, tokens, query], and add it to ``x`` [batch, tokens,
    hidden] in place.

    Temporaries at the peak, in elements per token: none where the product is added directly, else
    ``hidden``, or twice that with a norm after it.
    """
    matrix, bias = weights["output.weight"], bias_of(weights, "output")
    if layer.adds_plainly:
        add_linear(attended, matrix, bias, x)
        _norm_sum(x, weights, "attention", layer)
    else:
        _add_half(x, linear(attended, matrix, bias), weights, "attention", layer)


def finish_parallel(
    x: torch.Tensor, attended: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Finish a layer whose halves have the same input: ``finish_attention`` and ``feed_forward``.

    Temporaries at the peak: those of ``feed_forward``, and ``hidden`` elements per token.
    """
    assert layer.mlp is not None
    normed = norm(x, weights, "attention_norm" if layer.shares_norm else "mlp_norm", layer.norm)
    made = mlp.output(mlp.inner(normed, weights, layer.mlp), weights)
    del normed
    finish_attention(x, attended, weights, layer)
    _add_half(x, made, weights, "mlp", layer)


def feed_forward(x: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> None:
    """Run the second half of a layer: its MLP or its mixture of experts.

    Parameters
    ----------
    x
        Hidden states [batch, tokens, hidden]; the output is added to them in place.

    Notes
    -----
    Temporaries at the peak, in elements per token: with a gate ``hidden + 2 * inner`` (norm, gate,
    up), then ``inner + hidden``; without ``hidden + inner``. With experts ``hidden`` (norm) and
    those of ``executor.model.experts``. A norm after it takes ``hidden`` more.
    """
    normed = _normed_input(x, weights, "mlp", layer)
    if layer.experts is not None:
        routing = route(normed, weights, layer.experts)
        made = experts_output(normed, routing, weights, layer.experts)
    else:
        assert layer.mlp is not None
        inner = mlp.inner(normed, weights, layer.mlp)
        del normed
        if layer.adds_plainly:
            add_linear(inner, weights["down.weight"], bias_of(weights, "down"), x)
            _norm_sum(x, weights, "mlp", layer)
            return
        made = mlp.output(inner, weights)
    _add_half(x, made, weights, "mlp", layer)


def feed_forward_input(x: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> torch.Tensor:
    """Return the input of a layer's second half for ``x`` [batch, tokens, hidden]."""
    return _normed_input(x, weights, "mlp", layer)


def routing_of(normed: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> Routing:
    """Route tokens [batch, tokens, hidden] in a layer with experts."""
    assert layer.experts is not None
    return route(normed, weights, layer.experts)


def add_feed_forward(
    x: torch.Tensor, made: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Add the output of a layer's second half to ``x`` in place."""
    _add_half(x, made, weights, "mlp", layer)


def head_input(x: torch.Tensor, weights: LayerWeights, spec: NormSpec) -> torch.Tensor:
    """Normalise the last hidden states [..., hidden], and project them where the model does so.

    The weights are those of the first head chunk. Returns [..., head width].
    """
    normed = norm(x, weights, "final_norm", spec)
    matrix = weights.get("output_projection.weight")
    return normed if matrix is None else linear(normed, matrix)


def finish_logits(
    logits: torch.Tensor, weights: LayerWeights, head: HeadSpec, first: int = 0
) -> None:
    """Add the bias, scale and cap ``logits`` [..., rows] in place.

    ``first`` is the first of their rows in a chunk of the head.
    """
    bias = bias_of(weights, "head")
    if bias is not None:
        logits += bias[first : first + logits.shape[-1]]
    if head.scale != 1:
        logits *= head.scale
    if head.soft_cap is not None:
        logits.div_(head.soft_cap).tanh_().mul_(head.soft_cap)


def _normed_input(
    x: torch.Tensor, weights: LayerWeights, half: str, layer: LayerSpec
) -> torch.Tensor:
    if "before" not in layer.norm_places:
        return x
    return norm(x, weights, f"{half}_norm", layer.norm)


def _add_half(
    x: torch.Tensor, made: torch.Tensor, weights: LayerWeights, half: str, layer: LayerSpec
) -> None:
    """Add the output of one half of a layer to its input, in place."""
    if "after" in layer.norm_places:
        made = norm(made, weights, f"{half}_output_norm", layer.norm)
    if layer.residual_scale != 1:
        made.mul_(layer.residual_scale)
    x.add_(made)
    _norm_sum(x, weights, half, layer)


def _norm_sum(x: torch.Tensor, weights: LayerWeights, half: str, layer: LayerSpec) -> None:
    """Normalise the sum of one half's input and output in place, where the layer does so."""
    if "sum" in layer.norm_places:
        x.copy_(norm(x, weights, f"{half}_sum_norm", layer.norm))
