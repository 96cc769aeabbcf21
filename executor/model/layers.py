"""The decoder's arithmetic, one half layer at a time. Pure tensor maths: no placement.

Weights come as row chunks, because a placement may cut a matrix between two rows: the results do
not depend on where. Everything rounds where transformers' own modules round, so that the logits
are theirs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn import functional as F

from costmodel.model.layer_spec import (
    AttentionSpec,
    LayerSpec,
    NormSpec,
    RotarySpec,
)
from executor.model import mlp
from executor.model.experts import Routing, experts_output, route
from executor.model.matrices import LayerWeights, add_linear, bias_of, linear, vector
from profiles import kernels


def norm(x: torch.Tensor, weights: LayerWeights, name: str, spec: NormSpec) -> torch.Tensor:
    """Normalise ``x`` [..., hidden] as ``spec`` says."""
    weight = vector(weights, f"{name}.weight")
    if spec.kind == "rms":
        return rms_norm(x, weight, spec.eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias_of(weights, name), spec.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide ``x`` [..., hidden] by its root mean square, and scale by ``weight``.

    Temporaries at the peak: the result; without native kernels a float32 copy of ``x`` too.
    """
    out = torch.empty_like(x)
    kernels.rms_norm(x.view(-1, 1, x.shape[-1]), weight, eps, out.view(-1, 1, x.shape[-1]))
    return out


# Cosines and sines of a pass's positions (see ``kernels.rotate``).
Rotation = tuple[torch.Tensor, torch.Tensor]


def rotation_of(
    positions: torch.Tensor, rotary: RotarySpec, head_dim: int, dtype: torch.dtype
) -> Rotation:
    """Return cosines and sines [positions, head_dim / 2] of int64 [positions]."""
    frequencies = rotary_frequencies(rotary, head_dim, positions.device)
    angles = positions[:, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=8)
def rotary_frequencies(rotary: RotarySpec, head_dim: int, device: torch.device) -> torch.Tensor:
    """Return the angle per position of every pair of dimensions, float32 [head_dim / 2].

    The ``llama3`` kind follows transformers' ``_compute_llama3_parameters``: long waves are
    slowed by ``factor``, short ones kept, those between blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / rotary.theta**exponents
    if rotary.kind == "linear":
        return frequencies / rotary.factor
    if rotary.kind == "default":
        return frequencies
    wave_lengths = 2 * math.pi / frequencies
    blend = (rotary.original_max_positions / wave_lengths - rotary.low_freq_factor) / (
        rotary.high_freq_factor - rotary.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rotary.factor + blend * frequencies


def project_qkv(
    x: torch.Tensor,
    weights: LayerWeights,
    rotation: Rotation | None,
    layer: LayerSpec,
) -> torch.Tensor:
    """Norm, project and rotate: the first half of a decoder layer, up to its attention.

    Parameters
    ----------
    x
        Hidden states [batch, tokens, hidden]; not changed.
    rotation
        Of the positions of one sequence's tokens, where they are every sequence's, or of all
        tokens, sequence by sequence; ``None`` where they are not rotated.

    Returns
    -------
    torch.Tensor
        Queries, keys and values, [batch, tokens, query + 2 * kv]; see ``split_heads``.

    Notes
    -----
    Temporaries at the peak, in elements per token and ``qkv = query + 2 * kv``: the largest of
    ``hidden + qkv`` (norm and product), ``hidden`` and a float32 ``hidden`` (norm), ``qkv +
    query`` (rotation), and with norms of queries ``qkv + query`` and a float32 ``query``. ``qkv``
    lives on return. Matrix products in bfloat16 on the CPU take a few MiB of scratch for
    themselves.
    """
    # The norm is not bound to a name, so that it is gone once it has been multiplied.
    qkv = linear(
        _normed_input(x, weights, "attention", layer),
        weights["qkv.weight"],
        bias_of(weights, "qkv"),
    )
    attention = layer.attention
    heads = qkv.view(-1, attention.num_heads + 2 * attention.num_kv_heads, attention.head_dim)
    _norm_queries(heads, weights, layer)
    if rotation is not None:
        kernels.rotate(heads[:, : attention.num_heads + attention.num_kv_heads], *rotation)
    if attention.scale is not None:
        # Kernels of attention scale by the root of the head's width.
        heads[:, : attention.num_heads].mul_(attention.scale * attention.head_dim**0.5)
    return qkv


def _norm_queries(heads: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> None:
    """Normalise queries and keys in place, where the layer does; [tokens, heads, head_dim]."""
    attention = layer.attention
    if attention.qk_norm == "none":
        return
    queries, keys = heads[:, : attention.num_heads + attention.num_kv_heads].split(
        [attention.num_heads, attention.num_kv_heads], dim=1
    )
    for part, name in ((queries, "q_norm.weight"), (keys, "k_norm.weight")):
        rows = part if attention.qk_norm == "head" else part.flatten(1)[:, None]
        kernels.rms_norm(rows, vector(weights, name), layer.norm.eps, rows)


def split_heads(
    qkv: torch.Tensor, attention: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [..., heads, head_dim], keys and values [..., kv heads, head_dim] as views of
    all [..., query + 2 * kv]."""
    heads = qkv.unflatten(-1, (-1, attention.head_dim))
    kv_heads = attention.num_kv_heads
    q, k, v = heads.split([attention.num_heads, kv_heads, kv_heads], dim=-2)
    return q, k, v


def finish_attention(
    x: torch.Tensor, attended: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Project what was attended [batch, tokens, query], and add it to ``x`` [batch, tokens, hidden]
    in place.

    Temporaries at the peak, in elements per token: none where the product is added as it comes;
    else ``hidden``, with a norm behind twice that.
    """
    matrix, bias = weights["output.weight"], bias_of(weights, "output")
    if layer.adds_plainly:
        add_linear(attended, matrix, bias, x)
    else:
        _add_half(x, linear(attended, matrix, bias), weights, "attention", layer)


def feed_forward(x: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> None:
    """Run the MLP or the mixture of experts of a layer: the half behind its attention.

    Parameters
    ----------
    x
        Hidden states [batch, tokens, hidden]; what is made of them is added in place.

    Notes
    -----
    Temporaries at the peak, in elements per token: gated ``hidden + 2 * inner`` (norm, gate, up),
    then ``inner + hidden``; else ``hidden + inner``. With experts ``hidden`` (norm) and those of
    ``executor.model.experts``. A norm behind it takes ``hidden`` beside what was made.
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
            return
        made = mlp.output(inner, weights)
    _add_half(x, made, weights, "mlp", layer)


def feed_forward_input(x: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> torch.Tensor:
    """Return what the half behind attention takes of ``x`` [batch, tokens, hidden]."""
    return _normed_input(x, weights, "mlp", layer)


def routing_of(normed: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> Routing:
    """Return where tokens [batch, tokens, hidden] go in a layer with experts."""
    assert layer.experts is not None
    return route(normed, weights, layer.experts)


def add_feed_forward(
    x: torch.Tensor, made: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Add to ``x`` in place what the half behind attention made of it."""
    _add_half(x, made, weights, "mlp", layer)


def final_norm(x: torch.Tensor, weights: LayerWeights, spec: NormSpec) -> torch.Tensor:
    """Normalise the last hidden states [..., hidden]; weights are those of the first head chunk."""
    return norm(x, weights, "final_norm", spec)


def _normed_input(
    x: torch.Tensor, weights: LayerWeights, half: str, layer: LayerSpec
) -> torch.Tensor:
    if "before" not in layer.norm_places:
        return x
    return norm(x, weights, f"{half}_norm", layer.norm)


def _add_half(
    x: torch.Tensor, made: torch.Tensor, weights: LayerWeights, half: str, layer: LayerSpec
) -> None:
    """Add what one half of a layer made to its input, in place."""
    if "after" in layer.norm_places:
        made = norm(made, weights, f"{half}_output_norm", layer.norm)
    if layer.residual_scale != 1:
        made.mul_(layer.residual_scale)
    x.add_(made)
