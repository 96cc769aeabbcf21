"""Lower limits of a stage's time: its channels, shared resources, and the path of one batch.

Channels work at the same time, so a stage lasts at least as long as each of its limits. Every
limit is linear in the shares, so that it is a row of the program.
"""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.pricing.buffers import num_weight_pieces
from costmodel.pricing.channels import channel_seconds, contentions, cost_beside
from costmodel.pricing.latency import TaskWork, stage_work
from costmodel.pricing.linear_form import LinearForm, Quantity, total
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import Shares, unit_shares
from costmodel.pricing.stages import Stage
from costmodel.pricing.walks import WAITED, walk_limits

CPU_MEMORY = "cpu_memory"
ONE_BATCH = "one batch in series"
ON_DEMAND = (WAITED, "waits for sent experts")
IN_PLACE = "experts on the CPU"
# Tasks that run one after another in a pass where the CPU multiplies experts.
AROUND_EXPERTS = frozenset(
    {"project", "finish", "head", "return_tokens", "run_experts", "send_made"}
)
# Tasks that run one after another for a batch, layer by layer.
IN_SERIES = frozenset(
    {
        "project",
        "return_queries",
        "attend",
        "send_attended",
        "finish",
        "experts",
        "head",
        "return_hidden",
        "write_hidden",
        "read_hidden",
        "send_hidden",
    }
)


def stage_limits(problem: Problem, shares: Shares[Quantity], stage: Stage) -> dict[str, Quantity]:
    """Return ``{limit: seconds per sequence}``: the stage lasts as long as the largest.

    The limit of a channel is its busy seconds. ``unhidden_share``, a result of calibration, adds a
    part of the other channels' seconds.
    """
    work = stage_work(problem, shares, stage)
    limits = _limits(problem, shares, stage, work)
    alone = shares.of_one_batch(problem.gpu_batch_size)
    return limits | {ONE_BATCH: _in_series(stage_work(problem, alone, stage))}


def limit_forms(problem: Problem, stage: Stage) -> dict[str, LinearForm]:
    """Return the limits of a stage as linear forms of the shares."""
    units = unit_shares(problem.components)
    work = stage_work(problem, units, stage)
    # Composing two forms takes less time than evaluating all work on other forms.
    alone = units.of_one_batch(problem.gpu_batch_size).value_of(_in_series(work))
    return _limits(problem, units, stage, work) | {ONE_BATCH: alone}


def _in_series(work: Sequence[TaskWork[Quantity]]) -> Quantity:
    return total(w.seconds for w in work if w.kind in IN_SERIES)


def _limits(
    problem: Problem, shares: Shares[Quantity], stage: Stage, work: Sequence[TaskWork[Quantity]]
) -> dict[str, Quantity]:
    fill = fill_seconds(problem, shares) if stage.is_prefill else None
    limits = work_limits(problem, work, fill=fill, is_decode=not stage.is_prefill)
    if problem.walks_experts:
        limits |= walk_limits(problem, shares, stage, work)
    return limits


def work_limits(
    problem: Problem,
    work: Sequence[TaskWork[Quantity]],
    *,
    fill: Quantity | None = None,
    is_decode: bool = True,
) -> dict[str, Quantity]:
    """Return all limits of some work but that of one batch in series.

    ``fill`` are seconds of a load before computing starts. In decode, computing may also wait for
    experts.
    """
    busy = channel_seconds(work)
    limits = dict(busy)
    if fill is not None:
        name = _compute_channel(problem)
        limits[name] = limits[name] + fill
    if unhidden := problem.hardware.unhidden_share:
        of_all = total(limits.values())
        limits = {name: s * (1 - unhidden) + of_all * unhidden for name, s in limits.items()}
    for pair in contentions(problem.hardware):
        first, second = busy[pair.first], busy[pair.second]
        name = f"{pair.first} beside {pair.second}"
        limits[name] = first + second * cost_beside(pair.first_keeps, pair.second_keeps)
        name = f"{pair.second} beside {pair.first}"
        limits[name] = second + first * cost_beside(pair.second_keeps, pair.first_keeps)
    memory_rate = problem.hardware.cpu.memory_bytes_per_s
    moved = (w.memory_bytes for w in work if w.memory_bytes is not None)
    limits[CPU_MEMORY] = total(moved) * (1 / memory_rate)
    if problem.loads_on_demand and is_decode and not problem.walks_experts:
        # Computing waits for loads on demand. A piece is sent while the next one is read; where the
        # number of batches is open, the largest number of pieces counts.
        late = [w.seconds for w in work if w.kind in ("read_experts", "send_experts")]
        pieces = num_weight_pieces(problem.num_batches[1])
        for i, name in enumerate(ON_DEMAND[: len(late)]):
            waited: list[Quantity] = [busy[_compute_channel(problem)], late[i]]
            waited += [seconds * (1 / pieces) for seconds in late[:i] + late[i + 1 :]]
            limits[name] = total(waited)
    if problem.cpu_experts and is_decode:
        limits[IN_PLACE] = total(w.seconds for w in work if w.kind in AROUND_EXPERTS)
    return limits


def _compute_channel(problem: Problem) -> str:
    return "gpu_compute" if problem.hardware.has_gpu else "cpu_compute"


def fill_seconds(problem: Problem, shares: Shares[Quantity]) -> Quantity:
    """Return the seconds of loading the first decoder layer, when nothing can be computed yet."""
    hardware, first = problem.hardware, problem.sizes.layers[1]
    parts = [(shares.weights[c.name], c.num_bytes) for c in first.components]
    read = total(share.disk * (size / hardware.disk.read.peak) for share, size in parts)
    if hardware.gpu is None:
        return read
    rate = hardware.gpu.h2d.pinned_bytes_per_s
    return read + total(share.off_gpu * (size / rate) for share, size in parts)
