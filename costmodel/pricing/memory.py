"""Bytes on every tier: one term for every buffer that the executor allocates.

Terms are per sequence of the block (see ``Shares``); times the block size they are bytes. A tier
has one row for each moment of a possible peak. Its use is the largest row, and the program bounds
each row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from costmodel.model.layout import round_up
from costmodel.plan.policy import Policy
from costmodel.pricing.buffers import (
    NUM_BUFFERS,
    num_hidden_buffers,
    num_weight_buffers,
    staged_experts,
    staging_kind,
)
from costmodel.pricing.experts import experts_of
from costmodel.pricing.lane_memory import (
    pool_bytes,
    request_bytes,
    staged_pool_bytes,
    table_bytes,
)
from costmodel.pricing.linear_form import Quantity, total
from costmodel.pricing.outputs import ALTERNATIVE_BYTES, held_bytes, output_bytes
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import Shares
from costmodel.pricing.workspace import (
    ALLOCATOR_SHARE,
    LOGIT_BYTES,
    expert_bytes,
    scored_tile_bytes,
    workspace_bytes,
)
from profiles.aligned_io import PAGE_BYTES
from profiles.hardware import HardwareProfile

# Sparse attention keeps the sums of values in float32.
SUM_BYTES = 4
PHASES = ("prefill", "decode")
# Every pass of lanes may have prompts and decode.
LANE_PHASE = "run"
# While the head is computed, a token's place, the sum and the largest of its logits so far.
SCORING_TOKEN_BYTES = 48


def phases_of(policy: Policy) -> tuple[str, ...]:
    """Return the phases of a run: prefill and decode, or one of both over lanes."""
    return (LANE_PHASE,) if policy.lanes else PHASES


def memory_rows(
    problem: Problem, shares: Shares[Quantity]
) -> dict[str, dict[str, dict[str, Quantity]]]:
    """Return ``{tier: {row: {buffer: bytes per sequence}}}`` for every tier of the machine.

    A tier's use in a row is the sum of its terms. A policy fits when every row of every tier is
    at most the tier's capacity times ``per_block``.
    """
    rows = {"cpu": _cpu_rows(problem, shares), "disk": {"whole run": _disk(problem, shares)}}
    if problem.hardware.has_gpu:
        rows["gpu"] = _gpu_rows(problem, shares)
    return rows


def capacities(hardware: HardwareProfile) -> dict[str, int]:
    """Return the bytes that a machine offers on each of its tiers."""
    tiers = {"cpu": hardware.cpu.memory_bytes, "disk": hardware.disk.free_bytes}
    return tiers if hardware.gpu is None else {"gpu": hardware.gpu.memory_bytes, **tiers}


def with_capacities(hardware: HardwareProfile, budgets: Mapping[str, int]) -> HardwareProfile:
    """Return the machine with other capacities, in bytes, on the tiers named."""
    return hardware.with_budget(
        gpu_memory=budgets.get("gpu"), cpu_memory=budgets.get("cpu"), disk=budgets.get("disk")
    )


def with_margin(hardware: HardwareProfile, margin: float) -> HardwareProfile:
    """Return the machine without the share ``margin`` of each capacity."""
    left = {tier: math.floor(c * (1 - margin)) for tier, c in capacities(hardware).items()}
    return with_capacities(hardware, left)


def peak_bytes(problem: Problem, shares: Shares[float]) -> dict[str, int]:
    """Return the peak of each tier in bytes, for shares that are numbers."""
    return {
        tier: round(max(sum(terms.values()) for terms in rows.values()) / shares.per_block)
        for tier, rows in memory_rows(problem, shares).items()
    }


def _gpu_rows(problem: Problem, shares: Shares[Quantity]) -> dict[str, dict[str, Quantity]]:
    home: dict[str, Quantity] = {
        "weights": _weight_bytes(problem, {c: s.gpu for c, s in shares.weights.items()}),
        "cache": shares.cache_gpu * problem.cache_sequence_bytes,
        "hidden states": shares.activations_gpu * _hidden_bytes(problem),
        "hidden staging": shares.per_block * _hidden_staging_bytes(problem),
        "unpacked weights": shares.per_block * _unpacked_weight_bytes(problem),
        **_kept_terms(problem, shares),
    }
    # Prefill copies all rows that are stored off the GPU down; decode fetches those that the GPU
    # attends to. The larger of the two sets the size of the buffers. Rows from disk keep their
    # padding to whole pages in the buffers.
    off_gpu = shares.cache_cpu_per_block + shares.cache_disk_per_block * problem.disk_cache_padding
    staging = {
        "stored": off_gpu * _batch_cache_bytes(problem, problem.workload.kept_prompt_len),
        "fetched": (off_gpu - shares.attended_per_block)
        * _batch_cache_bytes(problem, problem.workload.context_len),
    }
    staged = {component: s.off_gpu for component, s in shares.weights.items()}
    layers = _weight_staging(problem, shares, staged, 0)
    return {
        f"{phase}, {moment} cache, {layer}": home
        | {"weight staging": weights, "cache staging": cache, "workspace": workspace}
        for phase, workspace in _workspaces(problem, shares).items()
        for moment, cache in staging.items()
        for layer, weights in layers.items()
    }


def _weight_bytes(problem: Problem, shares: Mapping[str, Quantity]) -> Quantity:
    return total(share * problem.sizes.component_bytes[name] for name, share in shares.items())


def _workspaces(problem: Problem, shares: Shares[Quantity]) -> dict[str, Quantity]:
    phases = PHASES if problem.lanes is None else (LANE_PHASE,)
    return {phase: shares.per_block * workspace_bytes(problem, phase) for phase in phases}


def _weight_staging(
    problem: Problem, shares: Shares[Quantity], staged: Mapping[str, Quantity], edge_bytes: int
) -> dict[str, Quantity]:
    """Return the bytes of all staging buffers, for each choice of one layer of each kind; the
    largest layer of each kind counts.

    ``staged`` are the staged shares of each class of components. A cut may be some rows off its
    fraction, and adds ``edge_bytes``.
    """
    kinds: dict[str, dict[str, Quantity]] = {}
    for name, layer in problem.sizes.staged_layers.items():
        kind = staging_kind(layer, experts=problem.expert_staging)
        count = num_weight_buffers(kind)
        # Experts that are walked through have room elsewhere.
        parts = [c for c in layer.components if not (c.is_experts and problem.walks_experts)]
        edges = sum(component.cut_bytes + edge_bytes for component in parts)
        size = shares.per_block * (count * edges)
        for component in parts:
            size = size + staged[component.name] * (count * component.num_bytes)
        kinds.setdefault(kind, {})[name] = size
    return {
        ", ".join(names): total(kinds[kind][name] for kind, name in zip(kinds, names, strict=True))
        for names in itertools.product(*kinds.values())
    }


def _cpu_rows(problem: Problem, shares: Shares[Quantity]) -> dict[str, dict[str, Quantity]]:
    home: dict[str, Quantity] = {
        "runtime": shares.per_block * problem.hardware.cpu.runtime_bytes,
        "outputs": shares.per_block * output_bytes(problem),
        "weights": _weight_bytes(problem, {c: s.cpu for c, s in shares.weights.items()}),
        "cache": shares.cache_cpu * problem.cache_sequence_bytes,
        "cache staging": shares.cache_disk_per_block
        * (_batch_cache_bytes(problem, problem.workload.context_len) * problem.disk_cache_padding),
        "value sums": (shares.attended if problem.hardware.has_gpu else shares.whole)
        * _value_sum_bytes(problem),
        "hidden states": shares.activations_cpu * _hidden_bytes(problem),
        "hidden staging": shares.per_block * _hidden_staging_bytes(problem),
    }
    if problem.lanes is not None:
        home |= _lane_terms(problem, shares)
    if problem.model.stage is not None:
        # A block arrives, and another one leaves, while a third is computed.
        home["hand-over"] = shares.whole * (NUM_BUFFERS * _hidden_bytes(problem))
    # A buffer for bytes from disk starts and ends at a page.
    on_disk = {component: s.disk for component, s in shares.weights.items()}
    staging = _weight_staging(problem, shares, on_disk, 2 * PAGE_BYTES)
    chunks = shares.per_block * _staged_chunk_bytes(problem)
    staging = {layer: size + chunks for layer, size in staging.items()}
    if problem.hardware.has_gpu:
        # The CPU attends with the queries of one batch while the next batch's arrive.
        home["attention staging"] = shares.attended_per_block * (
            NUM_BUFFERS * problem.gpu_batch_size * _attention_token_bytes(problem)
        )
        home["expert staging"] = shares.per_block * _expert_staging_bytes(problem)
        return {layer: home | {"weight staging": size} for layer, size in staging.items()}
    home |= _kept_terms(problem, shares)
    home["unpacked weights"] = shares.per_block * _unpacked_weight_bytes(problem)
    return {
        f"{phase}, {layer}": home | {"weight staging": size, "workspace": workspace}
        for phase, workspace in _workspaces(problem, shares).items()
        for layer, size in staging.items()
    }


def _disk(problem: Problem, shares: Shares[Quantity]) -> dict[str, Quantity]:
    num_components = sum(len(layer.components) for layer in problem.sizes.layers)
    # Without a disk there is no padding.
    page_bytes = PAGE_BYTES if problem.hardware.disk.free_bytes else 0
    cache = shares.cache_disk * (problem.cache_sequence_bytes * problem.disk_cache_padding)
    if problem.lanes is not None:
        cache = shares.cache_disk_per_block * pool_bytes(problem)
        num_components += problem.model.num_layers
    on_disk = {component: share.disk for component, share in shares.weights.items()}
    if (problem.walks_experts or problem.orders_experts) and page_bytes:
        # The file has experts by number, and any of them may be on disk.
        whole = shares.weights["experts"]
        on_disk["experts"] = whole.gpu + whole.off_gpu
    return {
        "weights": _weight_bytes(problem, on_disk),
        "cache": cache,
        "hidden states": shares.activations_disk * _hidden_bytes(problem),
        # Every component, every layer's cache of lanes, and every batch's hidden states start at a
        # page of the file.
        "page padding": shares.per_block * (page_bytes * num_components)
        + shares.whole * (page_bytes / problem.gpu_batch_size),
    }


def _hidden_bytes(problem: Problem) -> int:
    return problem.workload.prompt_len * problem.hidden_token_bytes


def _lane_terms(problem: Problem, shares: Shares[Quantity]) -> dict[str, Quantity]:
    """Return the terms that lanes have in place of those of a block in step."""
    assert problem.lanes is not None
    rows = problem.lanes.pass_rows
    return {
        "outputs": shares.per_block * (request_bytes(problem) + held_bytes(problem)),
        "cache": shares.cache_cpu_per_block * pool_bytes(problem),
        "cache staging": shares.per_block * (NUM_BUFFERS * staged_pool_bytes(problem)),
        "page tables": shares.per_block * table_bytes(problem),
        "hidden states": shares.per_block * (rows * problem.hidden_token_bytes),
    }


def _hidden_staging_bytes(problem: Problem) -> int:
    if problem.hidden_in_place is not False:
        return 0
    count = num_hidden_buffers(has_gpu=problem.hardware.has_gpu)
    return count * round_up(problem.gpu_batch_size * _hidden_bytes(problem), PAGE_BYTES)


def _batch_cache_bytes(problem: Problem, num_tokens: int) -> int:
    return NUM_BUFFERS * problem.gpu_batch_size * problem.layer_cache_bytes(num_tokens)


def _value_sum_bytes(problem: Problem) -> int:
    """Count the bytes of the value sums that sparse attention on the CPU keeps for a sequence."""
    if problem.attention_sparsity == 1:
        return 0
    attentions = [(kind.spec.attention, kind.count) for kind in problem.layer_kinds]
    # Latent attention reads all rows in any case, and adds them up anew.
    size = sum(count * a.kv_size for a, count in attentions if a.latent is None)
    return problem.blocks_in_flight * size * SUM_BYTES


def _attention_token_bytes(problem: Problem) -> int:
    # Queries, keys and values on arrival, a copy of keys and values to append, and the result.
    attentions = [kind.spec.attention for kind in problem.layer_kinds]
    elements = max(a.query_size + a.attended_size + 2 * a.cached_size for a in attentions)
    return elements * problem.model.dtype_bytes


def _staged_chunk_bytes(problem: Problem) -> int:
    """Count the bytes of the chunks of experts that are loaded on demand and computed."""
    if not problem.walks_experts:
        return 0
    return max(
        staged_experts(experts, layout.unit_bytes) * layout.unit_bytes
        for experts, layout, _ in experts_of(problem)
    )


def _expert_staging_bytes(problem: Problem) -> int:
    """Count the bytes of the CPU's experts beside a GPU: their inputs, outputs and temporaries."""
    if not problem.cpu_experts:
        return 0
    tokens = problem.gpu_batch_size * problem.num_batches[0]
    needed = 2 * tokens * problem.hidden_token_bytes + expert_bytes(problem, tokens, tokens)
    return round(needed * (1 + ALLOCATOR_SHARE))


def _kept_terms(problem: Problem, shares: Shares[Quantity]) -> dict[str, Quantity]:
    """Return the terms of the compute device that last for a pass: the input of the output head,
    the logits of its chunks, and the cosines and sines of rotary positions."""
    has_head = problem.model.has_head
    logits = problem.model.vocab_size * LOGIT_BYTES * has_head
    # With a head of one chunk, the token of a batch is chosen before the next batch's logits.
    kept = (
        shares.whole * logits
        if problem.sizes.num_head_chunks > 1
        else shares.per_block * (problem.gpu_batch_size * logits)
    )
    prompt_len = problem.workload.prompt_len
    rotated, scores = shares.whole + shares.per_block * prompt_len, shares.whole * prompt_len
    if problem.lanes is not None:
        # Every row of a pass has a rotation of its own, and no prompt is more than its rows.
        rotated = scores = shares.per_block * problem.lanes.pass_rows
    return {
        "head input": shares.whole * (problem.hidden_token_bytes * has_head),
        "logits": kept,
        "scores": scores * (_scoring_bytes(problem) * has_head),
        "scored logits": shares.per_block * _scored_tile_bytes(problem),
        "rotations": rotated * _rotation_bytes(problem),
    }


def _rotation_bytes(problem: Problem) -> int:
    """Count the bytes of the cosines and sines of one position, for all kinds of layers."""
    attentions = [kind.spec.attention for kind in problem.layer_kinds]
    rotated = {(a.rotary, a.head_dim) for a in attentions}
    dims = [rotary.dim or head_dim for rotary, head_dim in rotated if rotary]
    angles = sum(dims) * problem.model.dtype_bytes
    if problem.lanes is not None:
        # They are made in float32, for many rows at once, and of two lengths where these count.
        angles += 3 * LOGIT_BYTES * max(dims, default=0)
    # The factors of queries are float32.
    return angles + LOGIT_BYTES * sum(a.temperature_floor is not None for a in attentions)


def _scoring_bytes(problem: Problem) -> int:
    """Count what is kept of a token that is scored over the chunks of the head."""
    num_top = problem.workload.prompt_logprobs
    return 0 if num_top is None else SCORING_TOKEN_BYTES + num_top * ALTERNATIVE_BYTES


def _scored_tile_bytes(problem: Problem) -> int:
    is_scored = problem.workload.scores_prompts and problem.model.has_head
    return scored_tile_bytes(problem.model) if is_scored else 0


def _unpacked_weight_bytes(problem: Problem) -> int:
    """Count the bytes of the buffer for the unpacked matrices of the current layer."""
    if not problem.unpacks_layers:
        return 0
    components = [layer.components for layer in problem.sizes.staged_layers.values()]
    # Experts are unpacked one at a time.
    elements = max(sum(c.unit_elements for c in parts) for parts in components)
    if problem.unpacks_per_batch:
        elements = max(t.num_elements for parts in components for c in parts for t in c.tensors)
    return elements * problem.model.dtype_bytes
