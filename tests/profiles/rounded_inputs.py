"""What products with 4-bit weights make of their inputs, in plain torch."""

from __future__ import annotations

import torch

from profiles import kernels
from profiles.packing import Packing

# Inputs that share a scale, and the integer that the largest of them becomes.
GROUP, TOP = 64, 127


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """Return inputs [rows, n * GROUP] as float64, in 127ths of the largest of their group."""
    groups = x.float().unflatten(1, (-1, GROUP))
    most = groups.abs().amax(2, keepdim=True).clamp_min(1e-30)
    codes = (groups * torch.full_like(most, TOP).div(most)).round()
    rounded: torch.Tensor = codes.double() * (most / TOP).double()
    return rounded.flatten(1)


def multiplied_inputs(x: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """Return the inputs that a product with a matrix multiplies on this machine, as float64."""
    if packing is None or packing.bits != 4 or packing.num_elements % GROUP:
        return x.double()
    is_coded = kernels.rounds_inputs(x.dtype, packing.group_size)
    return rounded_inputs(x) if is_coded else x.double()
