"""Lower limits of a stage's time: its channels, shared resources, and the path of one batch.

Channels work at the same time, so a stage lasts at least as long as each of its limits. Every
limit is linear in the shares, so that it is a row of the program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from costmodel.pricing.buffers import num_weight_pieces
from costmodel.pricing.experts import num_chunks
from costmodel.pricing.latency import (
    TaskWork,
    ahead_seconds,
    head_load_seconds,
    stage_work,
)
from costmodel.pricing.linear_form import LinearForm, Quantity, total
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import Shares, unit_shares
from costmodel.pricing.stages import Stage
from profiles.hardware import Contention, HardwareProfile

CPU_MEMORY = "cpu_memory"
GPU_CHANNELS = frozenset({"h2d", "d2h", "gpu_compute"})
ONE_BATCH = "one batch in series"
ON_DEMAND = ("experts on demand, read", "experts on demand, sent")
FIRST_CHUNK = "first chunk of experts"
HEAD_READ = "head, read"
ALL_READ = "all loads, and the head"
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
        limits |= _walk_limits(problem, shares, stage, work)
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
        limits[name] = first + second * _cost_beside(pair.first_keeps, pair.second_keeps)
        name = f"{pair.second} beside {pair.first}"
        limits[name] = second + first * _cost_beside(pair.second_keeps, pair.first_keeps)
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


def channel_seconds(work: Sequence[TaskWork[Quantity]]) -> dict[str, Quantity]:
    """Add up the seconds of each channel."""
    pieces: dict[str, list[Quantity]] = {}
    for piece in work:
        pieces.setdefault(piece.channel, []).append(piece.seconds)
    return {channel: total(seconds) for channel, seconds in pieces.items()}


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


def _walk_limits(
    problem: Problem, shares: Shares[Quantity], stage: Stage, work: Sequence[TaskWork[Quantity]]
) -> dict[str, Quantity]:
    """Return the limits of a CPU that loads one chunk of experts while it computes another.

    In each layer, either all loads follow each other, and the last chunk is computed behind them.
    Or all chunks are computed one after another behind the first load. The first chunks may be read
    while the layer attends. A pass then takes no less than the head and all other reads. The head
    is read while it is computed, and takes the longer of the two.
    """
    computed, read, chunks = _compute_channel(problem), "disk_read", num_chunks(problem, stage)
    busy = channel_seconds(work)
    late, experts, head = (
        total(w.seconds for w in work if w.kind == kind)
        for kind in ("read_experts", "experts", "head")
    )
    last = experts * (1 / chunks)
    early = ahead_seconds(problem, shares, stage)
    head_read = head_load_seconds(problem, shares, stage)
    waited = busy[computed] - experts + late - early + last
    all_read = busy[read] - head_read + head + last
    # Reads slow down what is computed beside them, and the other way round.
    of_reads = of_computing = 0.0
    for pair in contentions(problem.hardware):
        if {pair.first, pair.second} == {computed, read}:
            keeps = pair.first_keeps, pair.second_keeps
            own, other = keeps if pair.first == computed else keeps[::-1]
            of_reads, of_computing = _cost_beside(own, other), _cost_beside(other, own)
    waited = waited + (busy[read] - late + early) * of_reads + (experts - last) * of_computing
    of_head = head_read * (1 - of_reads) + head * (of_computing - 1)
    return {
        ON_DEMAND[0]: waited,
        HEAD_READ: waited + of_head,
        ALL_READ: all_read + (busy[computed] - head - last) * of_computing,
        FIRST_CHUNK: busy[computed] + (late - early) * (1 / chunks),
    }


def contentions(hardware: HardwareProfile) -> Iterator[Contention]:
    """Yield the pairs of channels of a machine that slow each other down."""
    if hardware.gpu is not None:
        up, down = hardware.gpu.h2d, hardware.gpu.d2h
        yield Contention(
            first="h2d",
            second="d2h",
            first_keeps=min(1.0, up.opposed_bytes_per_s / up.pinned_bytes_per_s),
            second_keeps=min(1.0, down.opposed_bytes_per_s / down.pinned_bytes_per_s),
        )
    for pair in hardware.contention:
        # A budget may have taken the GPU away, and its link with it.
        if hardware.gpu is not None or not {pair.first, pair.second} & GPU_CHANNELS:
            yield pair


def _cost_beside(keeps: float, other_keeps: float) -> float:
    """Return the seconds that one channel loses for each busy second of the other.

    The pairs of rates that two channels can reach at once are the convex hull of (1, 0), (0, 1) and
    the measured pair; this is the slope of its edge. Where both at once do less than in turns, they
    take turns.
    """
    return min(1.0, (1 - keeps) / other_keeps)
