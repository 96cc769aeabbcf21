"""The arithmetic of one feed-forward network."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from costmodel.model.feed_forward_spec import MlpSpec
from executor.model.matrices import LayerWeights, bias_of, linear, split_rows, vector
from profiles import kernels
from profiles.kernels.xielu import SLOPE


def inner(x: torch.Tensor, weights: LayerWeights, mlp: MlpSpec, prefix: str = "") -> torch.Tensor:
    """Return the inner vectors [..., size] of an MLP; ``prefix`` begins its tensors' names."""
    if not mlp.is_gated:
        up_name = f"{prefix}up"
        found = linear(x, weights[f"{up_name}.weight"], bias_of(weights, up_name))
        if mlp.activation == "xielu":
            shapes = (vector(weights, f"{prefix}xielu.{side}") for side in ("positive", "negative"))
            return xielu(found, *shapes)
        return _activate(found, mlp)
    name = f"{prefix}gate_up"
    bias = bias_of(weights, name)
    gate_bias, up_bias = (None, None) if bias is None else bias.split(mlp.size)
    gate, up = split_rows(weights[f"{name}.weight"], mlp.size)
    found = linear(x, gate, gate_bias)
    apply_gate(found, linear(x, up, up_bias), mlp)
    return found


def output(inner: torch.Tensor, weights: LayerWeights, prefix: str = "") -> torch.Tensor:
    """Multiply inner vectors [..., size] by the last matrix: [..., hidden]."""
    name = f"{prefix}down"
    return linear(inner, weights[f"{name}.weight"], bias_of(weights, name))


def apply_gate(gate: torch.Tensor, up: torch.Tensor, mlp: MlpSpec) -> None:
    """Replace ``gate`` [..., ffn] by its activation times ``up``, which may be overwritten."""
    rows = gate.flatten(0, -2), up.flatten(0, -2)
    if mlp.swiglu_limit is not None:
        kernels.clamped_swiglu(*rows, limit=mlp.swiglu_limit, alpha=mlp.swiglu_alpha)
    elif mlp.activation == "silu":
        kernels.swiglu(*rows)
    else:
        _activate(gate, mlp).mul_(up)


def _activate(x: torch.Tensor, mlp: MlpSpec) -> torch.Tensor:
    if mlp.activation == "relu":
        return x.relu_()
    if mlp.activation == "relu2":
        return x.relu_().square_()
    kernels.activate(x.flatten(0, -2), mlp.activation)
    return x


def xielu(x: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Replace ``x`` by its xIELU: a parabola above zero, an exponential below.

    Parameters
    ----------
    x
        [..., ffn], contiguous; the result is in its place.
    positive, negative
        The learned parameters of the two sides, [1] in the dtype of ``x``, before the softplus that
        makes factors of them.
    """
    kernels.xielu(x.flatten(0, -2), F.softplus(positive), SLOPE + F.softplus(negative))
    return x
