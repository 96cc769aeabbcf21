"""Seconds of every kind of task: each term is written once, with ``+`` and ``*`` only.

Terms are linear in the shares and per sequence of the block (see ``Shares``); times the block
size they are seconds. Costs of a load of the weights are scaled by ``per_block``; costs of a batch
are divided by the batch size. The program uses the coefficients of the terms, the estimator their
sums, and the simulator divides each sum among the tasks of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from costmodel.plan.pages import PAGE
from costmodel.pricing.arithmetic import (
    attended_bytes,
    attention_seconds,
    head_seconds,
    matmul_seconds,
    routed_seconds,
)
from costmodel.pricing.experts import demanded_share, expert_visits, touched_bytes, visit_chunks
from costmodel.pricing.linear_form import Quantity, total
from costmodel.pricing.matrices import (
    multiplied_bytes,
    projected_share,
    unpack_experts_seconds,
    unpack_weights_seconds,
    unpacking_bytes,
)
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import Shares
from costmodel.pricing.stages import Stage, disk_cache_bytes, read_cache_bytes, stored_cache_bytes
from profiles.aligned_io import PAGE_BYTES, REQUEST_BYTES
from profiles.compute_rates import ComputeRates

# Each chunk of experts has a task of its own. A chunk of two tiny experts took 0.15 ms on two cores
# whose layers had a fixed cost of 0.28 ms.
CHUNK_SHARE = 1 / 2


@dataclass(frozen=True, slots=True)
class TaskWork(Generic[Quantity]):
    """One kind of task in one stage: its channel, its seconds and its traffic in CPU memory."""

    kind: str
    channel: str
    seconds: Quantity
    memory_bytes: Quantity | None = None


def stage_work(
    problem: Problem, shares: Shares[Quantity], stage: Stage
) -> list[TaskWork[Quantity]]:
    """Return the work of every kind of task in one stage, per sequence of the block."""
    if stage.parts:
        parts = [stage_work(problem, shares, part) for part in stage.parts]
        return [_sum_of(same) for same in zip(*parts, strict=True)]
    work: list[TaskWork[Quantity]] = list(_disk_work(problem, shares, stage))
    if problem.hardware.has_gpu:
        work.extend(_link_work(problem, shares, stage))
        work.extend(_gpu_work(problem, shares, stage))
        work.extend(_cpu_work_beside_gpu(problem, shares, stage))
    else:
        work.extend(_cpu_work(problem, shares, stage))
    return work


def _sum_of(parts: Sequence[TaskWork[Quantity]]) -> TaskWork[Quantity]:
    """Add up the work of one kind of task."""
    moved = [part.memory_bytes for part in parts if part.memory_bytes is not None]
    seconds = total(part.seconds for part in parts)
    return replace(parts[0], seconds=seconds, memory_bytes=total(moved) if moved else None)


def _disk_work(
    problem: Problem, shares: Shares[Quantity], stage: Stage
) -> Iterable[TaskWork[Quantity]]:
    disk = problem.hardware.disk
    loaded, stored = (shares.activations_disk * size for size in _hidden_moves(problem, stage))
    on_disk = {name: share.disk for name, share in shares.weights.items()}
    weights, experts = _loaded_bytes(problem, on_disk, stage, problem.rarest_on_disk)
    read, written = (shares.cache_disk * size for size in disk_cache_bytes(problem, stage))
    # Small requests have a lower rate.
    read_request, write_request = _cache_requests(problem, stage)
    read_rate = weight_rate(problem)
    cache_rate = disk.read.at(_request(read_request))
    write_rate = disk.write.at(_request(write_request))
    return (
        _move("read_weights", "disk_read", weights, read_rate),
        _move("read_experts", "disk_read", experts, read_rate),
        _move("read_hidden", "disk_read", loaded, read_rate),
        _move("read_cache", "disk_read", read, cache_rate),
        _move("write_cache", "disk_write", written, write_rate),
        _move("write_hidden", "disk_write", stored, write_rate),
    )


def weight_rate(problem: Problem) -> float:
    """Return the rate at which a disk reads weights."""
    return problem.hardware.disk.read.at(_request(problem.sizes.largest_layer_bytes))


def _cache_requests(problem: Problem, stage: Stage) -> tuple[float, float]:
    """Return the mean bytes of cache that a batch reads at once, and that it writes, in the layer
    with the largest cache."""
    caches = [kind.cache for kind in problem.layer_kinds]
    if problem.lanes is not None:
        # Pages in use are adjacent. Those with a new token are not.
        return float(REQUEST_BYTES), float(PAGE * max(cache.token_bytes for cache in caches))
    # Prompts among lanes have no pass of their own.
    passes = stage.passes or 1
    read = max(cache.token_bytes * stage.slots_read(cache) for cache in caches) / passes
    written = problem.layer_cache_bytes(int(stage.tokens // passes))
    return problem.gpu_batch_size * read, float(problem.gpu_batch_size * written)


def _move(kind: str, channel: str, num_bytes: Quantity, rate: float) -> TaskWork[Quantity]:
    return TaskWork(kind, channel, num_bytes * (1 / rate), num_bytes)


def _request(num_bytes: float) -> float:
    """Return the size of the requests of a move of ``num_bytes``."""
    return max(PAGE_BYTES, min(REQUEST_BYTES, num_bytes))


def _loaded_bytes(
    problem: Problem, shares: Mapping[str, Quantity], stage: Stage, rarest: float
) -> tuple[Quantity, Quantity]:
    """Return the bytes that all passes of the stage load ahead and on demand.

    ``shares`` are the fractions of each class of components that must be loaded, ``rarest`` that of
    the experts (see ``demanded_share``).
    """
    loads = stage.passes * problem.loads_per_block
    ahead = {
        name: problem.sizes.component_bytes[name] * loads
        for name in problem.sizes.staged_components
    }
    late = 0.0
    if problem.walks_experts or (problem.loads_on_demand and not stage.is_prefill):
        # Of passes with few lanes, the lanes count.
        late = ahead.pop("experts") * demanded_share(problem, stage, rarest) * stage.fullness
    # Every model has attention, so that a model without experts has a zero of the right type.
    of_late = shares["experts" if late else "attention"]
    return total(shares[name] * size for name, size in ahead.items()), of_late * late


def hidden_visits(problem: Problem, stage: Stage) -> tuple[int, int]:
    """How many layers load hidden states, and how many store them.

    The first chunk of the head keeps what the others need, unless prompts are scored: then each
    chunk loads all tokens again.
    """
    stored = problem.sizes.num_visits + 1
    again = problem.sizes.num_head_chunks - 1 if stage.scored_tokens else 0
    return stored + again, stored


def _hidden_moves(problem: Problem, stage: Stage) -> tuple[float, float]:
    """Bytes of hidden states that are loaded, and that are stored."""
    loads, stores = hidden_visits(problem, stage)
    num_bytes = stage.tokens * problem.hidden_token_bytes
    return num_bytes * loads, num_bytes * stores


def _link_work(
    problem: Problem, shares: Shares[Quantity], stage: Stage
) -> Iterable[TaskWork[Quantity]]:
    gpu, model = problem.hardware.gpu, problem.model
    assert gpu is not None
    off_gpu = shares.cache_cpu + shares.cache_disk
    fetched = off_gpu - shares.attended
    below_gpu = shares.activations_cpu + shares.activations_disk
    loaded, stored_hidden = (below_gpu * size for size in _hidden_moves(problem, stage))
    below = {name: share.off_gpu for name, share in shares.weights.items()}
    if problem.cpu_experts and not stage.is_prefill:
        below["experts"] = below["experts"] - shares.experts_in_place_per_block
    streamed, experts = _loaded_bytes(problem, below, stage, problem.rarest_off_gpu)
    # Where the CPU attends, queries, keys and values go down and the result comes up.
    attentions = [(kind.spec.attention, kind.count) for kind in problem.layer_kinds]
    element_bytes = model.dtype_bytes * stage.tokens
    query_bytes = sum(a.query_size * count for a, count in attentions) * element_bytes
    result_bytes = sum(a.attended_size * count for a, count in attentions) * element_bytes
    new_bytes = problem.unpacked_token_bytes * stage.tokens
    queries, stored = shares.attended * 0.0, off_gpu
    if not stage.is_prefill:
        queries, stored = shares.attended, fetched
    fetched_bytes = fetched * read_cache_bytes(problem, stage)
    stored_bytes = stored * stored_cache_bytes(problem, stage)
    # The CPU's experts take the hidden states of all tokens and return as many bytes.
    num_mixtures = problem.sizes.num_visits - model.num_layers
    is_exchanged = problem.cpu_experts and not stage.is_prefill
    exchanged = shares.whole * (
        is_exchanged * num_mixtures * stage.tokens * problem.hidden_token_bytes
    )
    up, down = gpu.h2d.pinned_bytes_per_s, gpu.d2h.pinned_bytes_per_s
    return (
        _move("send_weights", "h2d", streamed, up),
        _move("send_experts", "h2d", experts, up),
        _move("send_made", "h2d", exchanged, up),
        _move("send_cache", "h2d", fetched_bytes, up),
        _move("send_hidden", "h2d", loaded, up),
        _move("send_attended", "h2d", queries * result_bytes, up),
        _move("return_cache", "d2h", stored_bytes, down),
        _move("return_hidden", "d2h", stored_hidden, down),
        _move("return_tokens", "d2h", exchanged, down),
        _move("return_queries", "d2h", queries * (query_bytes + new_bytes), down),
    )


def _gpu_work(
    problem: Problem, shares: Shares[Quantity], stage: Stage
) -> Iterable[TaskWork[Quantity]]:
    gpu = problem.hardware.gpu
    assert gpu is not None
    attended = shares.whole - shares.attended
    seconds: dict[str, Quantity] = _layer_seconds(problem, stage, gpu.compute, shares, attended)
    if not stage.is_prefill:
        # Where the CPU attends, a layer is two tasks. The fixed cost of the second does not depend
        # on the share, but is counted in proportion to it, so that the program stays linear.
        cut = stage.passes * problem.model.num_layers / stage.sequences_at_once
        seconds["project"] = seconds["project"] + shares.attended * (
            cut * gpu.compute.task_overhead_s
        )
    head = shares.whole * head_seconds(problem, stage, gpu.compute, gpu.memory_bytes_per_s)
    seconds["head"] = head
    if problem.cpu_experts and not stage.is_prefill:
        moved_s = _routed_seconds(problem, stage, gpu.compute)
        seconds["experts"] = seconds["experts"] - shares.experts_in_place * moved_s
    return [TaskWork(kind, "gpu_compute", value) for kind, value in seconds.items()]


def _cpu_work_beside_gpu(
    problem: Problem, shares: Shares[Quantity], stage: Stage
) -> Iterable[TaskWork[Quantity]]:
    cpu, layers = problem.hardware.cpu, problem.model.num_layers
    attend, attend_bytes = shares.attended * 0.0, shares.attended * 0.0
    if not stage.is_prefill:
        attend = shares.attended * attention_seconds(problem, stage, cpu.compute)
        attend = attend + shares.attended * (
            layers * stage.passes * cpu.compute.task_overhead_s / stage.sequences_at_once
        )
        attend_bytes = shares.attended * attended_bytes(problem, stage)
    run, run_bytes = shares.experts_in_place * 0.0, shares.experts_in_place * 0.0
    if problem.cpu_experts and not stage.is_prefill:
        num_mixtures = problem.sizes.num_visits - problem.model.num_layers
        visits = expert_visits(stage)
        run = shares.experts_in_place * _routed_seconds(problem, stage, cpu.compute)
        run = run + shares.whole * (num_mixtures * cpu.compute.task_overhead_s * visits)
        run_bytes = shares.experts_in_place * (touched_bytes(problem, stage) * visits)
    return (
        TaskWork("attend", "cpu_compute", attend, attend_bytes),
        TaskWork("run_experts", "cpu_compute", run, run_bytes),
    )


def _routed_seconds(problem: Problem, stage: Stage, rates: ComputeRates) -> float:
    """Return the seconds of all routed experts on a device, with unpacking."""
    unpack_s = unpack_experts_seconds(problem, stage, rates) * expert_visits(stage)
    return routed_seconds(problem, stage, rates) + unpack_s


def _cpu_work(
    problem: Problem, shares: Shares[Quantity], stage: Stage
) -> Iterable[TaskWork[Quantity]]:
    """Work of a CPU that computes everything."""
    cpu = problem.hardware.cpu
    whole, loaded = shares.whole, _unpackings(problem, shares, stage)
    seconds: dict[str, Quantity] = _layer_seconds(
        problem, stage, cpu.compute, shares, shares.cache_cpu
    )
    if not stage.is_prefill:
        # Rows from disk are stored token by token, pages of lanes as in memory.
        rates = cpu.compute if problem.lanes is not None else problem.cpu_over_tokens
        moved_s = attention_seconds(problem, stage, rates)
        seconds["project"] = seconds["project"] + shares.cache_disk * moved_s
    memory_bytes: dict[str, Quantity] = {
        kind: whole * num_bytes for kind, num_bytes in multiplied_bytes(problem, stage).items()
    }
    memory_bytes["project"] = whole * attended_bytes(problem, stage)
    unpacked_bytes = loaded * unpacking_bytes(problem, stage)
    memory_bytes["finish"] = memory_bytes["finish"] + unpacked_bytes
    if problem.walks_experts:
        seconds["chunks"] = _chunk_seconds(problem, shares, stage)
    head = whole * head_seconds(problem, stage, cpu.compute, cpu.memory_bytes_per_s)
    seconds["head"] = head
    return [TaskWork(k, "cpu_compute", s, memory_bytes.get(k)) for k, s in seconds.items()]


def _chunk_seconds(problem: Problem, shares: Shares[Quantity], stage: Stage) -> Quantity:
    """Return the fixed cost of the chunks in which experts are loaded. In a search, the number of
    chunks goes with the share of the experts on disk."""
    visits = max(1.0, problem.num_batches[0] / problem.batches_at_once[1])
    visits *= stage.passes * problem.loads_per_block
    chunk_s = CHUNK_SHARE * problem.hardware.cpu.compute.task_overhead_s
    block_s = visits * chunk_s * visit_chunks(problem, stage)
    if problem.experts is None:
        return shares.weights["experts"].disk * block_s
    return shares.per_block * block_s


def _unpackings(problem: Problem, shares: Shares[Quantity], stage: Stage) -> Quantity:
    """Unpackings of all weights in a pass, per sequence of the block."""
    if problem.unpacks_per_batch:
        return shares.whole * (1 / stage.sequences_at_once)
    return shares.per_block


def _layer_seconds(
    problem: Problem,
    stage: Stage,
    rates: ComputeRates,
    shares: Shares[Quantity],
    attended: Quantity,
) -> dict[str, Quantity]:
    """Return the seconds of the decoder layers on the compute device.

    ``project`` includes the attention on that device, ``finish`` is the rest of a layer, and
    ``experts`` are mixtures of experts. ``attended`` is the share of the cache that the device
    attends to.
    """
    whole = shares.whole
    share = projected_share(problem)
    products = matmul_seconds(problem, stage, rates)
    unpack = _unpackings(problem, shares, stage) * unpack_weights_seconds(problem, stage, rates)
    # The embedding is a task of its own; the head's chunks are counted with the head.
    num_tasks = stage.passes * (problem.model.num_layers + 1)
    overhead = whole * (num_tasks * rates.task_overhead_s / stage.sequences_at_once)
    attention = attended * attention_seconds(problem, stage, rates)
    if stage.is_prefill:
        attention = whole * attention_seconds(problem, stage, rates)
    return {
        "project": whole * products.project + unpack * share + attention,
        "finish": whole * products.finish + unpack * (1 - share) + overhead,
        "experts": whole * _expert_seconds(problem, stage, rates, products.experts),
    }


def _expert_seconds(
    problem: Problem, stage: Stage, rates: ComputeRates, products_s: float
) -> float:
    """Return the seconds of all mixtures of experts, whose products take ``products_s``."""
    num_mixtures = problem.sizes.num_visits - problem.model.num_layers
    visit_s = unpack_experts_seconds(problem, stage, rates) + num_mixtures * rates.task_overhead_s
    return products_s + visit_s * expert_visits(stage)
