"""The normalisation of vectors."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from executor.model.matrices import LayerWeights, bias_of, vector
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


def normed_input(
    x: torch.Tensor, weights: LayerWeights, half: str, layer: LayerSpec
) -> torch.Tensor:
    """Return the input of one half of a layer: ``x`` [..., hidden] itself, or its norm.

    ``half`` is ``attention`` or ``mlp``.
    """
    if "before" not in layer.norm_places:
        return x
    return norm(x, weights, f"{half}_norm", layer.norm)
