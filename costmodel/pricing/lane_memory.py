"""Bytes of the buffers that only a policy with lanes has (``memory`` names its other terms)."""

from __future__ import annotations

from costmodel.model.layout import round_up
from costmodel.plan.pages import PAGE, PoolSizes, layer_bytes, rings_of
from costmodel.pricing.problem import Problem
from profiles.aligned_io import PAGE_BYTES

# A token that was generated is a Python int in a list.
TOKEN_BYTES = 48
# A request, its ids as numbers of 32 bits, and where its answer is, until the job ends.
REQUEST_BYTES = 512
ID_BYTES = 4
# Of each row of a pass: its id, its position and that of its sequence, as they are put together.
ROW_BYTES = 2 * 3 * 8
# A page's number in the table, in its copy for a pass, and in a list; and whether it
# is in use.
TABLE_BYTES = 2 * 4
LISTED_BYTES = 41


def num_lanes(problem: Problem) -> int:
    """Return the most sequences at work."""
    return problem.gpu_batch_size * problem.num_batches[1] * problem.blocks_in_flight


def pool_of(problem: Problem) -> PoolSizes:
    """Return the pages of the cache."""
    assert problem.lanes is not None
    return PoolSizes.of(
        problem.model, pool_tokens=problem.lanes.pool_tokens, most_lanes=num_lanes(problem)
    )


def _layer_bytes(problem: Problem) -> list[int]:
    """Count the bytes of all pages of a layer of each kind."""
    caches = (kind.cache for kind in problem.layer_kinds)
    return layer_bytes(problem.model, pool_of(problem), caches)


def pool_bytes(problem: Problem) -> int:
    """Count the bytes of all pages of all layers."""
    sizes = zip(problem.layer_kinds, _layer_bytes(problem), strict=True)
    return sum(kind.count * size for kind, size in sizes)


def staged_pool_bytes(problem: Problem) -> int:
    """Count the bytes of a buffer for the cache of any layer, where caches are on disk."""
    return round_up(max(_layer_bytes(problem)), PAGE_BYTES) if problem.stages_cache else 0


def table_bytes(problem: Problem) -> int:
    """Count the bytes of page tables, and of what a pass tells of each of its rows."""
    assert problem.lanes is not None
    pool = pool_of(problem)
    widest = pool.needed(problem.workload.num_positions)
    tables = num_lanes(problem) * sum(widest) * TABLE_BYTES
    return tables + sum(pool.pages) * LISTED_BYTES + problem.lanes.pass_rows * ROW_BYTES


def held_tokens(problem: Problem) -> int:
    """Return the most tokens of all sequences at work together, prompts included."""
    assert problem.lanes is not None
    most = num_lanes(problem) * problem.workload.num_positions
    # Where some layer keeps all tokens, its pages bound them; the last token needs no place.
    if None in rings_of(problem.model):
        most = min(most, problem.lanes.pool_tokens + PAGE + num_lanes(problem))
    return most


def request_bytes(problem: Problem) -> int:
    """Count the bytes of all requests. Their answers leave as they end."""
    workload = problem.workload
    count, lengths = workload.num_prompts or num_lanes(problem), workload.lengths
    tokens = count * workload.prompt_len
    if lengths is not None:
        tokens = sum(n * w for n, w in zip(lengths.prompts, lengths.weights, strict=True))
    return count * REQUEST_BYTES + tokens * ID_BYTES
