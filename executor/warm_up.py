"""What a GPU does once, before a run is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.layout import LayerLayout
from costmodel.policy import Policy
from executor.kv_cache import KVCache
from profiles import kernels
from profiles.compute_plan import DTYPES

# Packed rows begin at multiples of four bytes.
UNALIGNED = 4


def compile_kernels(
    policy: Policy, layers: Sequence[LayerLayout], cache: KVCache, device: torch.device
) -> None:
    """Have the kernels for packed rows compiled, each of which takes up to a second, by calling
    them for one row: where it begins at a multiple of 16 bytes, and where it does not, which makes
    two kernels of one."""
    dtype, model = DTYPES[policy.model.dtype], policy.model
    for matrix in {tensor.packing for layer in layers for tensor in layer.tensors}:
        if matrix is not None:
            raw = torch.zeros(UNALIGNED + matrix.row_bytes, dtype=torch.uint8, device=device)
            whole = torch.empty(1, 1, matrix.num_elements, dtype=dtype, device=device)
            for start in (0, UNALIGNED):
                packed = raw[start : start + matrix.row_bytes].view(1, 1, -1)
                kernels.unpack_rows(packed, matrix, whole)
    if cache.packing is None:
        return
    q = torch.zeros(1, model.num_heads, model.head_dim, dtype=dtype, device=device)
    out = q.view(model.num_kv_heads, model.group_size, model.head_dim)
    row_bytes = cache.packing.row_bytes
    context = torch.zeros(1, 2, len(out), row_bytes, dtype=torch.uint8, device=device)
    cache.append(context, out[:, 0].clone(), out[:, 0].clone())
    for lengths in (None, torch.ones(1, dtype=torch.int32, device=device)):
        kernels.decode_attention(
            q.clone(), context, out, lengths=lengths, packing=cache.packing,
            sparsity=policy.attention_sparsity,
        )  # fmt: skip
