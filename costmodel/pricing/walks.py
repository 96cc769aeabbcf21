"""Limits of a CPU that walks through experts, a chunk at a time, while the next ones are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.pricing.channels import channel_seconds, contentions, cost_beside
from costmodel.pricing.experts import bytes_ahead, num_chunks
from costmodel.pricing.latency import TaskWork, weight_rate
from costmodel.pricing.linear_form import Quantity, total
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import Shares
from costmodel.pricing.stages import Stage

WAITED = "waits for experts"
FIRST_CHUNK = "cpu_compute plus first experts"
HEAD_READ = "waits for experts plus head"
ALL_READ = "disk_read plus head"


def walk_limits(
    problem: Problem, shares: Shares[Quantity], stage: Stage, work: Sequence[TaskWork[Quantity]]
) -> dict[str, Quantity]:
    """Return the limits of a CPU that loads one chunk of experts while it computes another.

    In each layer, either all loads follow each other, and the last chunk is computed behind them.
    Or all chunks are computed one after another behind the first load. The first chunks may be read
    while the layer attends. A pass then takes no less than the head and all other reads. The head
    is read while it is computed, and takes the longer of the two.
    """
    computed, read, chunks = "cpu_compute", "disk_read", num_chunks(problem, stage)
    busy = channel_seconds(work)
    late, experts, head = (
        total(w.seconds for w in work if w.kind in kinds)
        for kinds in (("read_experts",), ("experts", "chunks"), ("head",))
    )
    last = experts * (1 / chunks)
    early = _read_ahead(problem, shares, stage)
    head_read = _head_read(problem, shares, stage)
    waited = busy[computed] - experts + late - early + last
    all_read = busy[read] - head_read + head + last
    # Reads slow down what is computed beside them, and the other way round.
    of_reads = of_computing = 0.0
    for pair in contentions(problem.hardware):
        if {pair.first, pair.second} == {computed, read}:
            keeps = pair.first_keeps, pair.second_keeps
            own, other = keeps if pair.first == computed else keeps[::-1]
            of_reads, of_computing = cost_beside(own, other), cost_beside(other, own)
    waited = waited + (busy[read] - late + early) * of_reads + (experts - last) * of_computing
    of_head = head_read * (1 - of_reads) + head * (of_computing - 1)
    return {
        WAITED: waited,
        HEAD_READ: waited + of_head,
        ALL_READ: all_read + (busy[computed] - head - last) * of_computing,
        FIRST_CHUNK: busy[computed] + (late - early) * (1 / chunks),
    }


def _head_read(problem: Problem, shares: Shares[Quantity], stage: Stage) -> Quantity:
    """Return the seconds in which the head is read, a part of those of ``read_weights``."""
    size = problem.sizes.component_bytes.get("head", 0)
    # Every model has attention, so that a stage without the head has a zero of the right type.
    share = shares.weights["head" if size else "attention"].disk
    return share * (size * stage.passes * problem.loads_per_block / weight_rate(problem))


def _read_ahead(problem: Problem, shares: Shares[Quantity], stage: Stage) -> Quantity:
    """Return the seconds in which experts are read before tokens are routed, a part of those of
    ``read_experts``."""
    loads = stage.passes * problem.loads_per_block
    return shares.per_block * (bytes_ahead(problem, stage) * loads / weight_rate(problem))
