"""How many buffers stage weights, cache and hidden states, and in how many pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import LayerLayout
from profiles.units import MIB

# A layer's weights are read into one buffer while the previous layer is computed from the other.
# The cache and the hidden states of a batch are double-buffered in the same way.
NUM_BUFFERS = 2
# Kinds of the staging buffers of experts.
# Lanes on a CPU: experts on demand have one buffer, because the router must choose before a load.
DEMANDED = "experts on demand"
# Beside a GPU: experts on demand or in place do not share buffers with the head. So the head is
# loaded beside all layers, and not only beside the last two.
APART = "experts"
# Otherwise they take turns with the head (see ``LayerLayout.staging``).
WITH_HEAD = "layers"
# Without a GPU, sequences in step load chunks of experts. At least as many experts are staged as
# a token chooses, in two chunks, or in so many small ones. Chunks of fewer than the least bytes
# would be too many tasks.
SMALL_CHUNKS = 4
LEAST_CHUNK_BYTES = 8 * MIB
# Share of the experts outside memory that the tokens of a visit must need, for the first chunks to
# be read before the tokens are routed.
NEARLY_ALL = 0.75
# While the CPU attends for one batch, the GPU has not finished the previous one, and the hidden
# states of the next one arrive.
NUM_HIDDEN_BUFFERS_BESIDE_GPU = 3


def num_hidden_buffers(*, has_gpu: bool) -> int:
    """Return the number of batches whose hidden states are staged at once."""
    return NUM_HIDDEN_BUFFERS_BESIDE_GPU if has_gpu else NUM_BUFFERS


def expert_staging(
    *, loads_on_demand: bool, multiplies_in_place: bool, has_gpu: bool, has_lanes: bool
) -> str:
    """Return the kind of the staging buffers of a model's experts."""
    if has_gpu:
        return APART if loads_on_demand or multiplies_in_place else WITH_HEAD
    return DEMANDED if loads_on_demand and has_lanes else WITH_HEAD


def staging_kind(layer: LayerLayout, *, experts: str) -> str:
    """Return the kind of the staging buffers in which a layer takes turns with others.

    ``experts`` is the kind of those of experts, see ``expert_staging``.
    """
    return experts if layer.kind == "experts" else layer.staging


def num_weight_buffers(kind: str) -> int:
    """Return the number of staging buffers of a kind."""
    return 1 if kind == DEMANDED else NUM_BUFFERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """How a visit of a layer loads experts on demand without a GPU.

    Parameters
    ----------
    size
        Most experts of a chunk.
    staged
        Chunks that are staged at once.
    count
        Chunks of the visit.
    ahead
        How many of them are read before the tokens are routed.
    """

    size: int
    staged: int
    count: int
    ahead: int


def chunks_of(
    experts: ExpertsSpec,
    num_tokens: int,
    num_loaded: int,
    skew: float,
    *,
    expert_bytes: int,
    may_read_ahead: bool = True,
) -> Chunks:
    """Return how a visit of ``num_tokens`` tokens loads experts.

    While a layer attends, the disk would have nothing to read. So where nearly all experts are
    needed, the first chunks are read before that is known, and chunks are small. Each chunk costs
    tasks. Where few experts are needed, chunks are large.

    Parameters
    ----------
    num_loaded
        Experts of the layer that are not in memory, so that no visit loads more.
    skew
        That of the workload.
    expert_bytes
        Stored bytes of an expert.
    """
    chosen = experts.experts_per_token
    # The other chunks have room for all experts on disk only where so many may be needed.
    may_read_ahead &= num_tokens * chosen >= num_loaded
    needed = experts.touched(num_tokens, skew, num_loaded / experts.num_experts)
    is_ahead = may_read_ahead and needed >= NEARLY_ALL * num_loaded
    size, staged = _staged(experts, expert_bytes, SMALL_CHUNKS if is_ahead else NUM_BUFFERS)
    count = -(-min(num_tokens * chosen, num_loaded) // size)
    return Chunks(
        size=size, staged=staged, count=count, ahead=min(staged, count) if is_ahead else 0
    )


def staged_experts(experts: ExpertsSpec, expert_bytes: int) -> int:
    """Return the experts of a layer for which visits need room."""
    counts = (_staged(experts, expert_bytes, parts) for parts in (NUM_BUFFERS, SMALL_CHUNKS))
    return max(math.prod(count) for count in counts)


def _staged(experts: ExpertsSpec, expert_bytes: int, parts: int) -> tuple[int, int]:
    """Return the experts of a chunk, and the chunks that are staged, if those of a token are cut
    into some parts. There are at least two: one is loaded while another is computed."""
    size = max(-(-experts.experts_per_token // parts), -(-LEAST_CHUNK_BYTES // expert_bytes))
    # Two chunks hold all experts.
    size = min(size, -(-experts.num_experts // NUM_BUFFERS))
    return size, max(NUM_BUFFERS, -(-experts.experts_per_token // size))


def num_weight_pieces(num_batches: int) -> int:
    """Return the number of pieces in which a layer's weights are loaded.

    One piece is loaded beside each batch. A single batch has two, so that the result of the CPU's
    attention can pass between them.
    """
    return max(2, num_batches)
