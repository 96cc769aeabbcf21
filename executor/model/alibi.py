"""The slopes of ALiBi on the device that attends (Press et al. 2022)."""

from __future__ import annotations

from functools import lru_cache

import torch

from costmodel.model.attention_spec import AttentionSpec


def slopes_of(attention: AttentionSpec, device: torch.device) -> torch.Tensor | None:
    """Return the slope of each query head, float32 [heads]; ``None`` without ALiBi."""
    return _on_device(attention.alibi_slopes, device) if attention.alibi_slopes else None


@lru_cache(maxsize=8)
def _on_device(slopes: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(slopes, dtype=torch.float32, device=device)
