"""How a device multiplies stored matrices, one by one: rates, seconds of unpacking, bytes read.

Rows that are encoded as the checkpoint has them are decoded as a CPU multiplies them. A real GPU
unpacks them first. Rows that are quantized by us are unpacked first, but for few rows of inputs;
not at all on a CPU that multiplies their codes. A CPU unpacks experts tile by tile as it multiplies
them: unpacking takes as long as for other matrices, but the product reads no memory.
"""

from __future__ import annotations

import math

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.tensor_layout import TensorLayout
from costmodel.pricing.experts import (
    expert_passes,
    expert_rows,
    expert_visits,
    experts_of,
    touched_bytes,
    touched_elements,
)
from costmodel.pricing.problem import Problem
from costmodel.pricing.stages import Stage
from profiles.compute_rates import ComputeRates

# Rates of unpacking count two bytes an element, for every dtype of the result.
UNPACKED_BYTES = 2
# Matrices that are multiplied before attention, at least in part.
BEFORE_ATTENTION = ("qkv.weight", "q_b.weight", "kv_b.weight")
# Rows of a product that is limited by arithmetic.
MANY_ROWS = 256
# Components that tokens pass together with the experts of their layer.
BESIDE_EXPERTS = frozenset({"router", "shared_expert"})


def is_real_gpu(problem: Problem, rates: ComputeRates) -> bool:
    """Whether these are the rates of a GPU that is not emulated."""
    gpu = problem.hardware.gpu
    return gpu is not None and not gpu.emulated and rates is gpu.compute


def is_direct(problem: Problem, stage: Stage, rates: ComputeRates) -> bool:
    """Whether packed weights are multiplied without unpacking them first."""
    rows = math.inf if stage.is_prefill else problem.gpu_batch_size
    return rows <= problem.direct_rows(rates)


def matmul_rate(
    problem: Problem,
    stage: Stage,
    rates: ComputeRates,
    rows: tuple[float, ...],
    tensor: TensorLayout,
) -> float:
    """Return the FLOP/s of products with a matrix, at the best of several numbers of rows."""
    dtype, width = problem.model.dtype, tensor.shape[1]
    if tensor.encoding is None or is_real_gpu(problem, rates):
        packed = is_direct(problem, stage, rates)
        return max(rates.matmul_rate(dtype, count, width, packed=packed) for count in rows)
    kind = tensor.encoding.kind
    rate = max(rates.encoded_matmul_rate(kind, dtype, count, width) for count in rows)
    if kind.name in rates.encoded_matmul:
        return rate
    # The rate of another encoding may be higher than that of reading the bytes of this one.
    gpu, cpu = problem.hardware.gpu, problem.hardware.cpu
    on_gpu = gpu is not None and rates is gpu.compute
    memory_rate = gpu.memory_bytes_per_s if gpu and on_gpu else cpu.memory_bytes_per_s
    return min(rate, 2.0 * max(rows) * width / tensor.row_bytes * memory_rate)


def routed_rate(
    problem: Problem,
    stage: Stage,
    rates: ComputeRates,
    experts: ExpertsSpec,
    tensor: TensorLayout,
) -> float:
    """Return the FLOP/s of products with a matrix of each expert.

    Experts that a CPU has just unpacked are in a cache. On two cores of an EPYC, 4 to 16 rows of
    bfloat16 then reached 470 to 760 GFLOP/s, and many rows 850.
    """
    rows = tuple(expert_rows(problem, experts, n) for n in stage.expert_tokens)
    if _is_unpacked(problem, stage, rates) and not is_real_gpu(problem, rates):
        rows = (MANY_ROWS, *rows)
    return matmul_rate(problem, stage, rates, rows, tensor)


def unpack_weights_seconds(problem: Problem, stage: Stage, rates: ComputeRates) -> float:
    """Seconds of unpacking all weights but experts once in every pass, where they are unpacked."""
    loads = stage.passes * problem.loads_per_block
    if problem.keeps_encodings and is_real_gpu(problem, rates):
        elements = problem.sizes.encoded_elements
        seconds = sum(n / rates.encoded_unpack_rate(kind) for kind, n in elements.items())
        return UNPACKED_BYTES * seconds * loads
    if not _is_unpacked(problem, stage, rates):
        return 0.0
    num_bytes = problem.sizes.staged_elements * UNPACKED_BYTES * loads
    return num_bytes / rates.unpack_rate(problem.weight_bits)


def unpack_experts_seconds(problem: Problem, stage: Stage, rates: ComputeRates) -> float:
    """Seconds of unpacking the experts that one visit of all layers needs, where it is done."""
    if problem.keeps_encodings and is_real_gpu(problem, rates):
        tokens, skew = max(stage.expert_tokens), problem.workload.expert_skew
        return UNPACKED_BYTES * sum(
            count
            * experts.touched(tokens, skew)
            * t.num_elements
            / rates.encoded_unpack_rate(how.kind)
            for experts, component, count in experts_of(problem)
            for t in component.tensors
            if (how := t.encoding) is not None
        )
    if not _is_unpacked(problem, stage, rates):
        return 0.0
    num_bytes = touched_elements(problem, stage) * UNPACKED_BYTES
    return num_bytes / rates.unpack_rate(problem.weight_bits)


def projected_share(problem: Problem) -> float:
    """Share of the unpacked weights that is multiplied before attention."""
    keeps = problem.keeps_encodings
    first = sum(
        kind.count * tensor.num_elements
        for kind in problem.layer_kinds
        for component in kind.components
        for tensor in component.tensors
        if tensor.name in BEFORE_ATTENTION and (tensor.encoding is not None or not keeps)
    )
    sizes = problem.sizes
    total = sum(sizes.encoded_elements.values()) if keeps else sizes.staged_elements
    return first / total if total else 0.0


def multiplied_bytes(problem: Problem, stage: Stage) -> dict[str, float]:
    """Bytes of weights that the CPU reads in a stage, per sequence, by the kind of work.

    Each batch reads attention and dense layers in each pass. Batches that pass through a mixture
    or the head together read its weights once.
    """
    sizes, is_unpacked = problem.sizes, _is_unpacked(problem, stage, problem.hardware.cpu.compute)
    reads = dict.fromkeys(sizes.staged_components, stage.passes / stage.sequences_at_once)
    for name in reads.keys() & BESIDE_EXPERTS:
        reads[name] = expert_passes(stage)
    if "head" in reads:
        # The last tokens of prompts pass in whole batches.
        batch = problem.gpu_batch_size if stage.is_prefill else stage.sequences_at_once
        reads["head"] = stage.passes / (batch * problem.head_batches_at_once[1])
    found = {"finish": 0.0, "experts": 0.0, "head": 0.0}
    for name, times in reads.items():
        if name == "experts":
            continue
        kind = "head" if name == "head" else "experts" if name in BESIDE_EXPERTS else "finish"
        num_bytes = sizes.component_bytes[name]
        if is_unpacked:
            num_bytes = sizes.component_elements[name] * problem.model.dtype_bytes
        found[kind] += times * num_bytes
    found["experts"] += touched_bytes(problem, stage) * expert_visits(stage)
    return found


def unpacking_bytes(problem: Problem, stage: Stage) -> float:
    """Bytes that the CPU reads and writes to unpack all weights but experts once in every pass."""
    if not _is_unpacked(problem, stage, problem.hardware.cpu.compute):
        return 0.0
    sizes = problem.sizes
    num_bytes = sizes.staged_bytes + sizes.staged_elements * problem.model.dtype_bytes
    return num_bytes * stage.passes * problem.loads_per_block


def _is_unpacked(problem: Problem, stage: Stage, rates: ComputeRates) -> bool:
    """Whether a device unpacks our packed weights before it multiplies them."""
    return problem.packs_weights and not is_direct(problem, stage, rates)
