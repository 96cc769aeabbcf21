"""Groups of 4-bit values back to 16 bits, in plain torch."""

from __future__ import annotations

import torch

# Values that share a scale and a zero.
GROUP_SIZE = 64


def unpack_groups(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return ``code * scale + zero`` for every 4-bit code.

    Parameters
    ----------
    packed
        uint8 [groups, GROUP_SIZE / 2]. Byte ``i`` holds code ``i`` of its group in the low half
        and code ``i + GROUP_SIZE / 2`` in the high one, so that both are written as runs.
    scale, zero
        bfloat16 or float16 [groups, 1], for groups that need not be symmetric about 0.

    Returns
    -------
    torch.Tensor
        [groups, GROUP_SIZE], of the dtype of ``scale``.
    """
    half = packed.shape[1]
    values = torch.empty(packed.shape[0], 2 * half, dtype=scale.dtype, device=packed.device)
    values[:, :half] = packed & 15
    values[:, half:] = packed >> 4
    return values.mul_(scale).add_(zero)
