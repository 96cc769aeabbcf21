"""The kernels in plain torch: what the native ones are held to, and what serves in their place."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def decode_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int,
    lengths: torch.Tensor | None,
    prompt_len: int,
) -> None:
    """See ``profiles.kernels.decode_attention``."""
    tokens, _, rows, head_dim = context.shape
    kv_heads = q.shape[1] // out.shape[1]
    queries = q.reshape(-1, out.shape[1], head_dim)[first_row : first_row + rows]
    mask = None
    if lengths is not None:
        slots = torch.arange(tokens, device=q.device)
        valid = (slots < lengths[:, None]) | (slots >= prompt_len)
        mask = valid.repeat_interleave(kv_heads, dim=0)[first_row : first_row + rows]
        mask = mask[:, None, None, :]
    keys, values = context[:, 0].transpose(0, 1), context[:, 1].transpose(0, 1)
    attended = F.scaled_dot_product_attention(
        queries[:, None], keys[:, None], values[:, None], attn_mask=mask
    )
    out.copy_(attended[:, 0])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See ``profiles.kernels.rms_norm``."""
    wide = x.float()
    # The norm, unlike the mean of squares, needs no second float32 tensor.
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    scaled = wide * scale if wide is x else wide.mul_(scale)
    torch.mul(scaled.to(x.dtype), weight, out=out)


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """See ``profiles.kernels.rotate``."""
    cosines, sines = cosines[:, None], sines[:, None]
    left, right = heads.chunk(2, dim=-1)
    right_part, left_part = right * sines, left * sines
    left.mul_(cosines).sub_(right_part)
    right.mul_(cosines).add_(left_part)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    """See ``profiles.kernels.swiglu``."""
    F.silu(gate, inplace=True).mul_(up)
