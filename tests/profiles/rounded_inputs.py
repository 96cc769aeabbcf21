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
    return rounded_inputs(x) if multiplies_codes(x.dtype, packing) else x.double()


def multiplies_codes(dtype: torch.dtype, packing: Packing | None) -> bool:
    """Whether this machine multiplies codes: it rounds inputs, and no values of the matrix."""
    if packing is None or packing.bits != 4 or packing.num_elements % GROUP:
        return False
    return kernels.rounds_inputs(dtype, packing.group_size)
