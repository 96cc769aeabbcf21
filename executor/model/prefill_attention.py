"""Attention of prefill (``profiles.kernels`` has that of decode). No placement.

Prompts of different lengths are padded on the right to the longest. Sequence ``i`` has its prompt
in slots ``[0, length_i)``, padding in ``[length_i, prompt_len)``, and its generated tokens from
slot ``prompt_len`` on.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def prefill_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend causally within each prompt.

    Parameters
    ----------
    q
        [batch, tokens, heads, head_dim], any strides.
    k, v
        [batch, tokens, kv heads, head_dim].

    Returns
    -------
    torch.Tensor
        [batch, tokens, heads * head_dim]. Rows of padding have no meaning. Causal attention never
        reads them for a row of a prompt, because they are to its right.

    Notes
    -----
    Works sequence by sequence where torch's kernel does not support grouped heads (on the CPU, and
    in float32). The heads of a group then share one key as a view; with a batch dimension, the keys
    would be repeated in memory. Temporaries beside the result: the result of one sequence, [heads,
    tokens, head_dim], and the kernel's own tiles.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if q.is_cuda and (heads == kv_heads or _knows_groups(q)):
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=heads != kv_heads,
        )
        return attended.transpose(1, 2).flatten(2)
    out = q.new_empty(batch, tokens, heads, head_dim)
    group = heads // kv_heads
    grouped, split = (kv_heads, group, tokens, head_dim), (tokens, kv_heads, group, head_dim)
    for i in range(batch):
        attended = F.scaled_dot_product_attention(
            q[i].view(split).permute(1, 2, 0, 3),
            k[i].transpose(0, 1)[:, None].expand(grouped),
            v[i].transpose(0, 1)[:, None].expand(grouped),
            is_causal=True,
        )
        out[i].view(split).copy_(attended.permute(2, 0, 1, 3))
    return out.flatten(2)


def _knows_groups(q: torch.Tensor) -> bool:
    """Whether torch's flash attention, the only kernel with grouped heads, takes this tensor."""
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)
