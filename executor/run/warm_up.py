"""Compilation of a GPU's kernels before a run is timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.layout import ComponentLayout, LayerLayout
from costmodel.model.tensor_layout import TensorLayout, row_packing
from costmodel.plan.policy import Policy
from executor.model.alibi import slopes_of
from profiles import kernels
from profiles.compute_plan import DTYPES
from profiles.packing import DIRECT_ROWS, GPU_DIRECT_ROWS, Packing

# Packed rows start at multiples of four bytes.
UNALIGNED = 4


def compile_kernels(
    policy: Policy,
    layers: Sequence[LayerLayout],
    device: torch.device,
) -> None:
    """Compile all kernels of a run, by calling each with tiny tensors.

    Compiling one takes up to a second.
    """
    _compile_layers(policy, device)
    components = {id(c): c for layer in layers for c in layer.components}.values()
    for matrix in {tensor.packing for component in components for tensor in component.tensors}:
        if matrix is not None:
            _compile_unpacking(matrix, DTYPES[policy.model.dtype], device)
    for component in components:
        for tensor in (tensor for tensor in component.tensors if len(tensor.shape) == 2):
            if tensor.encoding is not None:
                _compile_encoded(tensor, component, DTYPES[policy.model.dtype], device)
            elif component.is_experts:
                _compile_groups(tensor, DTYPES[policy.model.dtype], device)
            elif tensor.packing is not None and policy.gpu_batch_size <= GPU_DIRECT_ROWS:
                _compile_direct(tensor.packing, component, DTYPES[policy.model.dtype], device)
    for layer in policy.model.layer_kinds:
        packing = row_packing(layer.attention.head_dim, policy.cache_bits, policy.group_size)
        if packing is not None:
            _compile_attention(policy, layer.attention, packing, device)


def _compile_layers(policy: Policy, device: torch.device) -> None:
    model = policy.model
    ones = partial(torch.ones, dtype=DTYPES[model.dtype], device=device)
    for layer in model.layer_kinds:
        attention, latent = layer.attention, layer.attention.latent
        normed = {
            "head": [attention.head_dim],
            "projection": [attention.query_size, attention.kv_size],
        }.get(attention.qk_norm, [])
        heads = [ones(1, 1, attention.head_dim)]
        if latent is not None:
            normed = [latent.rank, *([latent.query_rank] if latent.query_rank else [])]
            # Behind the parts of queries and rows that are not rotated.
            heads = [ones(1, 1, latent.key_dim)[..., latent.nope_dim :]]
            heads.append(ones(1, 1, latent.row_dim)[..., latent.rank :])
        for dim in (model.hidden_size, *normed) if layer.norm.kind == "rms" else ():
            kernels.rms_norm(ones(1, 1, dim), ones(dim), layer.norm.eps, ones(1, 1, dim))
        if (rotary := attention.rotary) is not None:
            angles = ones(1, (rotary.dim or attention.head_dim) // 2)
            for part in heads:
                kernels.rotate(part, angles, angles, interleaved=rotary.is_interleaved)


def _compile_unpacking(matrix: Packing, dtype: torch.dtype, device: torch.device) -> None:
    """Compile unpacking twice: for rows at a multiple of 16 bytes, and for other rows."""
    raw = torch.zeros(UNALIGNED + matrix.row_bytes, dtype=torch.uint8, device=device)
    whole = torch.empty(1, 1, matrix.num_elements, dtype=dtype, device=device)
    for start in (0, UNALIGNED):
        packed = raw[start : start + matrix.row_bytes].view(1, 1, -1)
        kernels.unpack_rows(packed, matrix, whole)


def _compile_encoded(
    tensor: TensorLayout, component: ComponentLayout, dtype: torch.dtype, device: torch.device
) -> None:
    """Compile unpacking, and the products of experts: for few rows of each, and for more."""
    assert tensor.encoding is not None
    how, width = tensor.encoding, tensor.shape[1]
    zeros = partial(torch.zeros, device=device)
    matrix = kernels.EncodedMatrix(
        rows=zeros(1, tensor.row_bytes, dtype=torch.uint8),
        encoding=how,
        num_elements=width,
        table=zeros(how.table_elements(1, width)) if how.has_table else None,
    )
    kernels.unpack_encoded(matrix, zeros(1, width, dtype=dtype))
    bias_name = tensor.name.removesuffix("weight") + "bias"
    has_bias = any(other.name == bias_name for other in component.tensors)
    is_grouped = component.is_experts and not tensor.is_sorted
    for num_rows in (1, DIRECT_ROWS) if is_grouped else ():
        x, out = zeros(num_rows, width, dtype=dtype), zeros(num_rows, 1, dtype=dtype)
        kernels.grouped_encoded(x, [num_rows], [matrix], out, [out[0]] if has_bias else None)


def _compile_groups(tensor: TensorLayout, dtype: torch.dtype, device: torch.device) -> None:
    """Compile products with experts' matrices: for few rows of each, and for more."""
    weight = torch.zeros(1, tensor.row_bytes, dtype=torch.uint8, device=device)
    weight = weight if tensor.packing else weight.view(dtype)
    for num_rows in (1, DIRECT_ROWS):
        x = torch.zeros(num_rows, tensor.shape[1], dtype=dtype, device=device)
        kernels.grouped_linear(x, [num_rows], [weight], packing=tensor.packing)


def _compile_direct(
    packing: Packing, component: ComponentLayout, dtype: torch.dtype, device: torch.device
) -> None:
    """Compile products with packed weights: with and without a bias, where there is any, and a sum
    that they are added to; for rows at a multiple of 16 bytes, and for other rows."""
    x = torch.zeros(1, packing.num_elements, dtype=dtype, device=device)
    raw = torch.zeros(UNALIGNED + packing.row_bytes, dtype=torch.uint8, device=device)
    out = torch.zeros(1, 1, dtype=dtype, device=device)
    has_bias = any(tensor.name.endswith("bias") for tensor in component.tensors)
    for start in (0, UNALIGNED):
        matrix = raw[start : start + packing.row_bytes].view(1, -1)
        for bias in (out[0], None) if has_bias else (None,):
            for adds in (False, True):
                kernels.multiply_rows(x, matrix, packing, out, bias, adds=adds)


def _compile_attention(
    policy: Policy, attention: AttentionSpec, packing: Packing, device: torch.device
) -> None:
    dtype, shape = DTYPES[policy.model.dtype], (attention.num_heads, attention.head_dim)
    q = torch.zeros(1, *shape, dtype=dtype, device=device)
    rows, vectors = attention.num_kv_heads, attention.cached_vectors
    out = q.new_empty(rows, attention.group_size, attention.attended_dim)
    context = torch.zeros(1, vectors, rows, packing.row_bytes, dtype=torch.uint8, device=device)
    kernels.pack_rows(q.new_zeros(vectors, rows, attention.head_dim), packing, context[-1])
    sinks = torch.zeros(attention.num_heads, device=device) if attention.has_sinks else None
    for void_slots in (None, torch.ones(1, 2, dtype=torch.int32, device=device)):
        kernels.decode_attention(
            q.clone(),
            context,
            out,
            void_slots=void_slots,
            soft_cap=attention.soft_cap,
            sinks=sinks,
            slopes=slopes_of(attention, device),
            packing=packing,
            sparsity=policy.attention_sparsity,
        )
