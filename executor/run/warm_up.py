"""What a GPU does once, before a run is timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from costmodel.model.layout import LayerLayout
from costmodel.plan.policy import Policy
from executor.checkpoint.families import DecoderConfig
from executor.stores.kv_cache import KVCache
from profiles import kernels
from profiles.compute_plan import DTYPES
from profiles.packing import Packing

# Packed rows begin at multiples of four bytes.
UNALIGNED = 4


def compile_kernels(
    policy: Policy,
    config: DecoderConfig,
    layers: Sequence[LayerLayout],
    cache: KVCache,
    device: torch.device,
) -> None:
    """Have all kernels compiled that a run will call, each of which takes up to a second, by
    calling them for next to nothing."""
    _compile_layer(policy, config, device)
    for matrix in {tensor.packing for layer in layers for tensor in layer.tensors}:
        if matrix is not None:
            _compile_unpacking(matrix, DTYPES[policy.model.dtype], device)
    if cache.packing is not None:
        _compile_attention(policy, cache, cache.packing, device)


def _compile_layer(policy: Policy, config: DecoderConfig, device: torch.device) -> None:
    model = policy.model
    ones = partial(torch.ones, dtype=DTYPES[model.dtype], device=device)
    if model.is_gated:
        for dim in (model.hidden_size, *([model.head_dim] if config.qk_norm else [])):
            kernels.rms_norm(ones(1, 1, dim), ones(dim), config.norm_eps, ones(1, 1, dim))
    if config.rope is not None:
        angles = ones(1, model.head_dim // 2)
        kernels.rotate(ones(1, 1, model.head_dim), angles, angles)


def _compile_unpacking(matrix: Packing, dtype: torch.dtype, device: torch.device) -> None:
    """Compile unpacking twice: where a row begins at a multiple of 16 bytes, and where not."""
    raw = torch.zeros(UNALIGNED + matrix.row_bytes, dtype=torch.uint8, device=device)
    whole = torch.empty(1, 1, matrix.num_elements, dtype=dtype, device=device)
    for start in (0, UNALIGNED):
        packed = raw[start : start + matrix.row_bytes].view(1, 1, -1)
        kernels.unpack_rows(packed, matrix, whole)


def _compile_attention(
    policy: Policy, cache: KVCache, packing: Packing, device: torch.device
) -> None:
    model = policy.model
    q = torch.zeros(1, model.num_heads, model.head_dim, dtype=DTYPES[model.dtype], device=device)
    out = q.view(model.num_kv_heads, model.group_size, model.head_dim)
    context = torch.zeros(1, 2, len(out), packing.row_bytes, dtype=torch.uint8, device=device)
    cache.append(context, torch.zeros_like(out[:, 0]).expand(2, -1, -1))
    for lengths in (None, torch.ones(1, dtype=torch.int32, device=device)):
        kernels.decode_attention(
            q.clone(), context, out, lengths=lengths, packing=packing,
            sparsity=policy.attention_sparsity,
        )  # fmt: skip
