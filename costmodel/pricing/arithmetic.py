"""Seconds of arithmetic on one device, per sequence of the block, for all passes of a stage.

No placement: ``latency`` multiplies these by the share that each device does.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.pricing.experts import experts_of
from costmodel.pricing.matrices import (
    UNPACKED_BYTES,
    is_direct,
    is_real_gpu,
    matmul_rate,
    routed_rate,
)
from costmodel.pricing.problem import Problem
from costmodel.pricing.sizes import LayerKind
from costmodel.pricing.stages import Stage
from costmodel.pricing.workspace import LOGIT_BYTES, SCORED_ROWS
from profiles.compute_rates import ComputeRates

# Passes over float32 logits to choose a token: conversion from the model's dtype, then searches.
SAMPLING_PASSES = 3
# Passes over float32 logits to score a token: their exponentials are also summed.
SCORING_PASSES = 5


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of all decoder layers: before their attention (``project``), after it (``finish``),
    and in their mixtures of experts."""

    project: float = 0.0
    finish: float = 0.0
    experts: float = 0.0


def matmul_seconds(problem: Problem, stage: Stage, rates: ComputeRates) -> LayerSeconds:
    """Seconds of the matrix products of all decoder layers, and of grouping tokens by expert."""
    last = problem.model.layer_order[-1]
    sums = {"project": 0.0, "finish": 0.0, "experts": 0.0}
    for number, kind in enumerate(problem.layer_kinds):
        sums["project"] += kind.count * _reordering_seconds(problem, kind, stage, rates)
        tokens = kind.count * stage.tokens
        # In prefill, the head needs each prompt's last token only, so the last layer finishes no
        # other, unless prompts are scored.
        is_last = number == last and problem.model.has_head
        skipped = stage.tokens - 1 if stage.is_prefill and is_last else 0
        skipped -= stage.scored_tokens if is_last else 0
        experts = kind.spec.experts
        for component in kind.components:
            for tensor in component.tensors:
                if len(tensor.shape) < 2:
                    continue
                flop = 2.0 * tensor.num_elements
                rows: tuple[float, ...] = stage.matmul_rows
                part, count = "finish", tokens - skipped
                if experts is not None and component.name == "attention":
                    count = tokens
                elif experts is not None:
                    part, rows = "experts", stage.expert_tokens
                if experts is not None and component.is_experts:
                    flop *= experts.experts_per_token
                    rate = routed_rate(problem, stage, rates, experts, tensor)
                else:
                    rate = matmul_rate(problem, stage, rates, rows, tensor)
                first = _share_before_attention(tensor.name, kind.spec.attention, stage)
                sums["project"] += first * flop * tokens / rate
                sums[part] += (1 - first) * flop * count / rate
        if experts is not None:
            sums["experts"] += _grouping_seconds(problem, experts, tokens - skipped, rates)
    return LayerSeconds(**sums)


def _grouping_seconds(
    problem: Problem, experts: ExpertsSpec, num_tokens: float, rates: ComputeRates
) -> float:
    """Seconds of sorting tokens by their experts and adding the experts' outputs up."""
    if not rates.grouping_bytes_per_s:
        return 0.0
    row_bytes = problem.model.hidden_size * problem.model.dtype_bytes
    return num_tokens * experts.experts_per_token * row_bytes / rates.grouping_bytes_per_s


def _share_before_attention(name: str, attention: AttentionSpec, stage: Stage) -> float:
    """Share of the products with a matrix that is computed before attention.

    With latent attention, decode multiplies queries by the key rows of a matrix, and the result by
    its value rows. These are as many products for a token as prefill needs for its key and value.
    """
    if name in ("qkv.weight", "q_b.weight"):
        return 1.0
    if name != "kv_b.weight" or attention.latent is None:
        return 0.0
    latent = attention.latent
    return 1.0 if stage.is_prefill else latent.nope_dim / (latent.nope_dim + latent.value_dim)


def _reordering_seconds(
    problem: Problem, kind: LayerKind, stage: Stage, rates: ComputeRates
) -> float:
    """Return the seconds of transposing the key rows of latent attention on a CPU, per sequence.

    Each batch of decode does so. Where packed or encoded weights are multiplied directly, these
    matrices are unpacked too.
    """
    latent, rate = kind.spec.attention.latent, rates.unpack_rate(problem.weight_bits)
    if latent is None or stage.is_prefill or not rate:
        return 0.0
    on_gpu = is_real_gpu(problem, rates)
    rows = 0 if on_gpu else latent.nope_dim
    if problem.packs_weights and is_direct(problem, stage, rates):
        rows += latent.nope_dim + latent.value_dim
    seconds = kind.spec.attention.num_heads * rows * latent.rank / rate
    for component in kind.components:
        for tensor in component.tensors:
            if tensor.name == "kv_b.weight" and tensor.encoding is not None and not on_gpu:
                seconds += tensor.num_elements / rates.encoded_unpack_rate(tensor.encoding.kind)
    return seconds * UNPACKED_BYTES * stage.passes / stage.sequences_at_once


def routed_seconds(problem: Problem, stage: Stage, rates: ComputeRates) -> float:
    """Seconds of all routed experts, without routers and shared experts."""
    seconds = 0.0
    for experts, component, count in experts_of(problem):
        flop = 2.0 * experts.experts_per_token * count * stage.tokens
        seconds += _grouping_seconds(problem, experts, count * stage.tokens, rates)
        matrices = [tensor for tensor in component.tensors if len(tensor.shape) == 2]
        for tensor in matrices:
            rate = routed_rate(problem, stage, rates, experts, tensor)
            seconds += flop * tensor.num_elements / rate
    return seconds


def attended_bytes(problem: Problem, stage: Stage) -> float:
    """Stored bytes of the cache that the CPU's attention reads for one sequence."""
    rates = problem.hardware.cpu.compute
    return sum(
        kind.count
        * kind.cache.token_bytes
        * stage.slots_read(kind.cache)
        * _read_share(problem, kind, rates)
        for kind in problem.layer_kinds
    )


def attention_seconds(problem: Problem, stage: Stage, rates: ComputeRates) -> float:
    """Seconds of attention in all layers, and of packing new keys and values."""
    model = problem.model
    seconds = 0.0
    if problem.packs_cache:
        packed_bytes = sum(
            kind.count * kind.cache.full_token_bytes * stage.slots_stored(kind.cache)
            for kind in problem.layer_kinds
        )
        rate = rates.unpack_rate(problem.cache_bits)
        seconds = packed_bytes / model.dtype_bytes * UNPACKED_BYTES / rate
    for kind in problem.layer_kinds:
        if stage.is_prefill:
            flop = 4.0 * stage.seen_twice(kind.spec.attention) * kind.spec.attention.prompt_size
            seconds += kind.count * flop / rates.attention_prefill[model.dtype]
            continue
        token_bytes = kind.count * kind.cache.full_token_bytes * _read_share(problem, kind, rates)
        read_bytes = token_bytes * stage.slots_read(kind.cache)
        read_s = read_bytes / _decode_rate(problem, kind.spec, rates)
        seconds += max(read_s, kind.count * _latent_seconds(problem, kind, stage, rates))
    return seconds


def _latent_seconds(problem: Problem, kind: LayerKind, stage: Stage, rates: ComputeRates) -> float:
    """Seconds of the products of latent attention in decode, at the rate of matrix products.

    All query heads share one row of a token, so that products take longer than reading it.
    """
    attention = kind.spec.attention
    if attention.latent is None:
        return 0.0
    flop = 2.0 * attention.num_heads * (attention.head_dim + attention.attended_dim)
    rate = rates.matmul_rate(problem.model.dtype, attention.num_heads, attention.head_dim)
    return flop * stage.slots_read(kind.cache) / rate


def _decode_rate(problem: Problem, layer: LayerSpec, rates: ComputeRates) -> float:
    """Unpacked bytes of the cache that attention reads in a second."""
    attention = layer.attention
    bits = problem.cache_bits if problem.packs_cache else None
    rate = rates.attention_rate(problem.model.dtype, bits, attention.group_size, attention.head_dim)
    if problem.attention_sparsity < 1 and rates.sparse_attention_bytes_per_s:
        rate = min(rate, rates.sparse_attention_bytes_per_s)
    return rate


def head_seconds(problem: Problem, stage: Stage, rates: ComputeRates, memory_rate: float) -> float:
    """Seconds of the output head and the choice of a token, one token of each sequence a pass; and
    of scoring prompts. A stage without the head has the fixed cost of handing over only."""
    model, batch = problem.model, problem.gpu_batch_size * problem.head_batches_at_once[1]
    flop = 2 * model.vocab_size * model.head_width
    logits_bytes = LOGIT_BYTES * model.vocab_size
    overhead_s = problem.sizes.num_head_chunks * stage.passes * rates.task_overhead_s / batch
    overhead_s *= stage.fullness
    matrix = problem.sizes.head_matrix
    if matrix is None:
        return overhead_s
    rate = matmul_rate(problem, stage, rates, (batch,), matrix)
    chosen_s = flop / rate + SAMPLING_PASSES * logits_bytes / memory_rate
    rate = matmul_rate(problem, stage, rates, (SCORED_ROWS,), matrix)
    scored_s = flop / rate + SCORING_PASSES * logits_bytes / memory_rate
    return chosen_s * stage.passes * stage.fullness + scored_s * stage.scored_tokens + overhead_s


def _read_share(problem: Problem, kind: LayerKind, rates: ComputeRates) -> float:
    """Share of the cache that attention reads on its device.

    The CPU reads all keys, and each value that at least one query of its group picks; queries are
    taken for independent. Where new tokens replace old ones, it reads all values for their mean. A
    GPU reads the whole cache, and moves between tiers are of all of it.
    """
    on_gpu = is_real_gpu(problem, rates)
    # A measured rate counts the bytes of the whole cache.
    context_len = problem.workload.context_len
    is_ring = kind.cache.num_slots(context_len) < context_len
    # In the cache of latent attention, each vector is a key.
    reads_all = on_gpu or is_ring or kind.cache.vectors == 1
    if reads_all or rates.sparse_attention_bytes_per_s:
        return 1.0
    picked = 1 - (1 - problem.attention_sparsity) ** kind.spec.attention.group_size
    return (1 + picked) / 2
