"""GGUF's blocks of 256 elements in plain torch: two levels of scales.

Every product of a scale, its own scale and a code is exact in float32, so that only the difference
with a minimum is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from profiles.encodings import Kind


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()[..., None]


def _shifted(codes: torch.Tensor, shifts: list[int]) -> torch.Tensor:
    """Shift uint8 [blocks, runs, bytes] right by each amount: [blocks, runs, shifts, bytes]."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=codes.device)
    return codes[:, :, None] >> by[:, None]


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, :16, None]
    codes = _shifted(blocks[:, 16:80].unflatten(1, (2, 32)), [0, 2, 4, 6]) & 3
    steps, least = _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4)
    return codes.reshape(-1, 16, 16) * steps - least


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _shifted(blocks[:, 32:96].unflatten(1, (2, 32)), [0, 2, 4, 6]) & 3
    mask = _shifted(blocks[:, None, :32], list(range(8))) & 1
    codes = low.reshape(-1, 16, 16).float() - 4 * (1 - mask.reshape(-1, 16, 16).float())
    four = _shifted(blocks[:, None, 96:104], [0, 4]).reshape(-1, 16) & 15
    two = _shifted(blocks[:, None, 104:108], [0, 2, 4, 6]).reshape(-1, 16) & 3
    scales = (four | two << 4).float() - 32
    return codes * (_half(blocks, 108) * scales[..., None])


def _shared_steps(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minima of each 32 elements, [blocks, 8, 1]: 6 bits of 12 bytes."""
    first, second, low = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first & 63, (low & 15) | (first >> 2 & 48)], dim=1)
    minima = torch.cat([second & 63, (low >> 4) | (second >> 2 & 48)], dim=1)
    return _half(blocks, 0) * scales[..., None], _half(blocks, 2) * minima[..., None]


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    steps, least = _shared_steps(blocks)
    codes = _shifted(blocks[:, 16:].unflatten(1, (4, 32)), [0, 4]) & 15
    return codes.reshape(-1, 8, 32) * steps - least


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    steps, least = _shared_steps(blocks)
    low = _shifted(blocks[:, 48:].unflatten(1, (4, 32)), [0, 4]) & 15
    fifth = _shifted(blocks[:, None, 16:48], list(range(8))) & 1
    codes = low.reshape(-1, 8, 32) | fifth.reshape(-1, 8, 32) << 4
    return codes * steps - least


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _shifted(blocks[:, :128].unflatten(1, (2, 64)), [0, 4]) & 15
    high = _shifted(blocks[:, 128:192].unflatten(1, (2, 32)), [0, 2, 4, 6]) & 3
    codes = low.reshape(-1, 16, 16) | high.reshape(-1, 16, 16) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (codes.float() - 32) * (_half(blocks, 208) * scales[..., None])


DECODERS: Mapping[Kind, Callable[[torch.Tensor], torch.Tensor]] = {
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
