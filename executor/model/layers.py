"""The decoder's arithmetic after attention, and its head. Pure tensor maths: no placement.

Weights come as row chunks, because a placement may cut a matrix between two rows. The results do
not depend on the cuts. They are rounded at the same points as in transformers' modules, so that the
logits are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import EmbeddingSpec, HeadSpec
from executor.model import mlp
from executor.model.experts import experts_output, route
from executor.model.matrices import LayerWeights, add_linear, bias_of, linear
from executor.model.norms import norm, normed_input
from executor.model.routing import Routing
from profiles import kernels


def finish_attention(
    x: torch.Tensor, attended: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Project the attention's output [batch, tokens, query], and add it to ``x`` [batch, tokens,
    hidden] in place.

    Temporaries at the peak, in elements per token: none where the product is added directly, else
    ``hidden``. A norm after it takes ``hidden`` more. A gate takes ``hidden + query`` before the
    product, and multiplies ``attended`` in place.
    """
    if layer.attention.has_output_gate:
        normed = normed_input(x, weights, "attention", layer)
        gate = linear(normed, weights["attention_gate.weight"])
        kernels.activate(gate.flatten(0, -2), "sigmoid")
        attended.mul_(gate)
        del normed, gate
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


def feed_forward(
    x: torch.Tensor,
    weights: LayerWeights,
    layer: LayerSpec,
    on_routing: Callable[[Routing], None] = lambda routing: None,
) -> None:
    """Run the second half of a layer: its MLP or its mixture of experts.

    Parameters
    ----------
    x
        Hidden states [batch, tokens, hidden]; the output is added to them in place.
    on_routing
        Called with the experts of all tokens, in a layer that has experts.

    Notes
    -----
    Temporaries at the peak, in elements per token: with a gate ``hidden + 2 * inner`` (norm, gate,
    up), then ``inner + hidden``; without ``hidden + inner``. With experts ``hidden`` (norm) and
    those of ``executor.model.experts``. A norm after it takes ``hidden`` more.
    """
    normed = normed_input(x, weights, "mlp", layer)
    if layer.experts is not None:
        routing = route(normed, weights, layer.experts)
        on_routing(routing)
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
    return normed_input(x, weights, "mlp", layer)


def routing_of(normed: torch.Tensor, weights: LayerWeights, layer: LayerSpec) -> Routing:
    """Route tokens [batch, tokens, hidden] in a layer with experts."""
    assert layer.experts is not None
    return route(normed, weights, layer.experts)


def add_feed_forward(
    x: torch.Tensor, made: torch.Tensor, weights: LayerWeights, layer: LayerSpec
) -> None:
    """Add the output of a layer's second half to ``x`` in place."""
    _add_half(x, made, weights, "mlp", layer)


def scale_embedding(rows: torch.Tensor, spec: EmbeddingSpec) -> None:
    """Multiply rows of the token table [..., hidden] by the factor of ``spec`` in place."""
    if spec.scale == 1:
        return
    scale = torch.tensor(spec.scale, dtype=rows.dtype if spec.rounds_scale else torch.float64)
    rows *= scale.item()


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
