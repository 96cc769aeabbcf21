"""Keys and values on their way to the cache: the tokens that are kept, packed if the cache is."""

from __future__ import annotations

import torch

from profiles.errors import RunError
from profiles.kernels import pack_rows
from profiles.packing import Packing


def last_tokens(x: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last ``count`` tokens of prompts [batch, tokens, heads, head_dim] of ``lengths``
    [batch]. Those of shorter prompts come last; their first token fills the slots before."""
    places = torch.arange(count, device=x.device) + (lengths[:, None] - count)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, places.clamp_(min=0)]


def in_stored_form(x: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """Return keys or values [batch, tokens, heads, head_dim] as the cache stores them.

    They are ``x`` itself, or bytes [batch, tokens, heads, row_bytes]. Raises ``RunError`` as
    ``pack`` does.
    """
    if packing is None:
        return x
    packed = x.new_empty(*x.shape[:3], packing.row_bytes, dtype=torch.uint8)
    pack(x.flatten(0, 1), packing, packed.flatten(0, 1))
    return packed


def pack(x: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    """Pack keys or values [outer, rows, head_dim] into bytes ``out`` [outer, rows, row_bytes].

    Raises
    ------
    RunError
        Where one of them is not a finite number. A GPU is not asked, because a check would wait.
    """
    if not pack_rows(x, packing, out):
        raise RunError(
            "a key or value is not a finite number, and cannot be quantized; try computing in"
            " bfloat16 or float32, or check the checkpoint"
        )
