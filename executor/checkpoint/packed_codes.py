"""Codes of 4 and 8 bits: out of the words of files, and into the bytes of our rows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from profiles.encodings import NIBBLE_RUN
from profiles.errors import InputError

# Of the bytes of an int32.
LOW_HALVES = 0x0F0F0F0F


def words_as_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the uint8 codes of int32 words in the last dimension, the lowest bits first."""
    if words.dtype != torch.int32:
        raise InputError("packed codes", got=words.dtype, allowed="int32")
    if bits == 8:
        return as_bytes(words)
    # Four codes at a time: arithmetic on bytes would take several times as long.
    halves = [_spread(words & 0xFFFF), _spread((words >> 16) & 0xFFFF)]
    return torch.stack(halves, dim=-1).flatten(-2).view(torch.uint8)


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Move the four 4-bit codes in the low half of each int32 to bytes of their own."""
    x = (x | x << 8) & 0x00FF00FF
    return (x | x << 4) & LOW_HALVES


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a copy, uint8, in the last dimension."""
    # Of one column, torch takes any stride for contiguous, but views only those of 1.
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def in_runs(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes by runs: the first half of each in low halves of bytes."""
    codes = F.pad(codes, (0, -codes.shape[-1] % NIBBLE_RUN)).contiguous()
    fours = codes.view(torch.int32).unflatten(-1, (-1, 2, NIBBLE_RUN // 8))
    low, high = fours.unbind(-2)
    pairs: torch.Tensor = low | high << 4
    return pairs.flatten(-2).view(torch.uint8)


def in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes by pairs, the first in the low half."""
    low, high = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    pairs: torch.Tensor = low | high << 4
    return pairs
