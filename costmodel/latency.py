"""Seconds on every channel in both phases: each term is written once, with ``+`` and ``*`` only.

Terms are per sequence of the block (see ``Shares``); times the block size they are seconds. What
happens once per load of the weights is scaled by ``per_block``; what happens once per batch is
divided by the batch size. Channels work at the same time, so a phase lasts as long as its
busiest one. Of what two of them share, the cores that the disk takes from a computing CPU are
charged to it; memory bandwidth and a link used both ways are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.memory import PHASES
from costmodel.problem import Problem, Quantity, Shares
from profiles.aligned_io import PAGE_BYTES, REQUEST_BYTES

Terms = dict[str, Quantity]

# Cores that the disk keeps busy while it moves bytes: on two cores, a matrix product beside a
# direct read kept 85 % of its speed. Counted where the CPU is what computes.
DISK_CORES = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseWork:
    """What one phase does to one sequence.

    Parameters
    ----------
    passes
        Passes over the model.
    tokens
        Tokens that go through every layer.
    matmul_rows
        Rows of a matrix product: the tokens that are computed at once.
    context_tokens
        Slots of the cache that are read, summed over the passes.
    stored_tokens
        Slots of the cache that are written and must outlive their pass.
    """

    passes: int
    tokens: int
    matmul_rows: int
    context_tokens: float
    stored_tokens: int


def phase_work(problem: Problem, phase: str) -> PhaseWork:
    """Return the counts of one phase."""
    workload = problem.workload
    if phase == "prefill":
        return PhaseWork(
            passes=1,
            tokens=workload.prompt_len,
            matmul_rows=problem.prefill_batch_size * workload.prompt_len,
            context_tokens=0,
            # With one token to generate, nobody reads the cache again.
            stored_tokens=workload.prompt_len if workload.gen_len > 1 else 0,
        )
    steps = workload.gen_len - 1
    # Step t, from 1 on, reads the prompt and the t - 1 tokens before its own.
    context = steps * workload.prompt_len + steps * (steps - 1) / 2
    return PhaseWork(
        passes=steps,
        tokens=steps,
        matmul_rows=problem.gpu_batch_size,
        context_tokens=context,
        # The last token is sampled and never attended to.
        stored_tokens=max(0, steps - 1),
    )


def phase_terms(problem: Problem, shares: Shares) -> dict[str, dict[str, Quantity]]:
    """Return ``{phase: {channel: seconds per sequence}}`` for the channels of the machine."""
    return {phase: _channel_terms(problem, shares, phase) for phase in PHASES}


def _channel_terms(problem: Problem, shares: Shares, phase: str) -> Terms:
    work = phase_work(problem, phase)
    disk = _disk_terms(problem, shares, work)
    if problem.hardware.has_gpu:
        return disk | _link_terms(problem, shares, work) | _gpu_compute_terms(problem, shares, work)
    compute = _compute_seconds(problem, work, attended_here=1.0)
    contention = DISK_CORES / problem.hardware.cpu.num_cores
    return disk | {"cpu_compute": compute + sum(disk.values()) * contention}


def _disk_terms(problem: Problem, shares: Shares, work: PhaseWork) -> Terms:
    disk = problem.hardware.disk
    padded = problem.cache_token_bytes * problem.model.num_layers * problem.disk_cache_padding
    hidden = shares.activations_disk * _hidden_moves(problem, work)
    weights = shares.weights_disk * (problem.staged_weight_bytes * work.passes)
    mean_context = work.context_tokens / max(1, work.passes)
    cache_read = shares.cache_disk * (padded * work.context_tokens)
    cache_write = shares.cache_disk * (padded * work.stored_tokens)
    # Small pieces move at the disk's rate for small requests.
    batch_bytes = problem.cache_token_bytes * problem.gpu_batch_size
    weight_rate = disk.read.at(_request(problem.largest_layer_bytes))
    cache_rate = disk.read.at(_request(batch_bytes * mean_context))
    write_rate = disk.write.at(_request(batch_bytes * work.tokens / max(1, work.passes)))
    return {
        "disk_read": (weights + hidden) * (1 / weight_rate) + cache_read * (1 / cache_rate),
        "disk_write": (cache_write + hidden) * (1 / write_rate),
    }


def _request(num_bytes: float) -> float:
    """Return the size of the requests that a move of so many bytes is made of."""
    return max(PAGE_BYTES, min(REQUEST_BYTES, num_bytes))


def _hidden_moves(problem: Problem, work: PhaseWork) -> int:
    """Bytes of hidden states that pass between two layers, one way."""
    return work.tokens * problem.hidden_token_bytes * (problem.model.num_layers + 1)


def _link_terms(problem: Problem, shares: Shares, work: PhaseWork) -> Terms:
    gpu, model = problem.hardware.gpu, problem.model
    assert gpu is not None
    layers = model.num_layers
    token_bytes = problem.cache_token_bytes * layers
    off_gpu = shares.cache_cpu + shares.cache_disk
    fetched = off_gpu - shares.attended
    hidden = (shares.activations_cpu + shares.activations_disk) * _hidden_moves(problem, work)
    weights = (shares.weights_cpu + shares.weights_disk) * (
        problem.staged_weight_bytes * work.passes
    )
    # Attending on the CPU sends queries, keys and values down and the result up.
    is_prefill = work.context_tokens == 0
    query_bytes = 0 if is_prefill else work.tokens * model.query_size * model.dtype_bytes * layers
    down = (off_gpu if is_prefill else fetched) * (token_bytes * work.stored_tokens)
    if not is_prefill:
        down = down + shares.attended * (query_bytes + token_bytes * work.tokens)
    up = weights + fetched * (token_bytes * work.context_tokens) + shares.attended * query_bytes
    return {
        "h2d": (up + hidden) * (1 / gpu.h2d.pinned_bytes_per_s),
        "d2h": (down + hidden) * (1 / gpu.d2h.pinned_bytes_per_s),
    }


def _gpu_compute_terms(problem: Problem, shares: Shares, work: PhaseWork) -> Terms:
    cpu = problem.hardware.cpu.compute
    cache_bytes = problem.cache_token_bytes * problem.model.num_layers * work.context_tokens
    rate = cpu.attention_decode[problem.model.dtype]
    return {
        "gpu_compute": _compute_seconds(problem, work, attended_here=1 - shares.attended),
        "cpu_compute": shares.attended * (cache_bytes / rate),
    }


def _compute_seconds(problem: Problem, work: PhaseWork, *, attended_here: Quantity) -> Quantity:
    """Seconds of the device that computes: products, attention, and the cost of its tasks."""
    model, rates = problem.model, problem.hardware.compute
    matmul = rates.matmul[model.dtype]
    decoder = next(layer for layer in problem.layers if layer.kind == "decoder")
    flop = 2 * decoder.num_matrix_elements * model.num_layers * work.tokens
    seconds = flop / matmul.at(work.matmul_rows)
    # The head sees one token of each sequence and pass, also in prefill.
    head_flop = 2 * model.vocab_size * model.hidden_size * work.passes
    seconds += head_flop / matmul.at(problem.gpu_batch_size)
    num_tasks = work.passes * len(problem.layers)
    at_once = problem.gpu_batch_size
    if work.context_tokens == 0:
        at_once = problem.prefill_batch_size
    seconds += num_tasks * rates.task_overhead_s / at_once
    if work.context_tokens == 0:
        square = 4 * work.tokens**2 * model.query_size * model.num_layers
        return seconds + square / rates.attention_prefill[model.dtype]
    cache_bytes = problem.cache_token_bytes * model.num_layers * work.context_tokens
    return attended_here * (cache_bytes / rates.attention_decode[model.dtype]) + seconds
