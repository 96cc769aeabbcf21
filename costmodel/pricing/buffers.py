"""How many buffers stage weights, cache and hidden states, and in how many pieces."""

from __future__ import annotations

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import LayerLayout

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
# Without a GPU, sequences in step load chunks of experts. As many experts are staged as a token
# chooses, in at most so many chunks, and at least two: one is loaded while another is computed.
MOST_STAGED_CHUNKS = 4
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


def chunk_experts(experts: ExpertsSpec) -> int:
    """Return the most experts of one chunk of loads on demand."""
    return -(-experts.experts_per_token // MOST_STAGED_CHUNKS)


def num_staged_chunks(experts: ExpertsSpec) -> int:
    """Return how many chunks of loads on demand are staged at once."""
    return max(2, -(-experts.experts_per_token // chunk_experts(experts)))


def num_expert_chunks(experts: ExpertsSpec, num_tokens: int, num_loaded: int) -> int:
    """Return the chunks in which a visit loads the experts of ``num_tokens`` tokens on demand.

    ``num_loaded`` experts of the layer are not in memory, so that no visit loads more.
    """
    most = min(num_tokens * experts.experts_per_token, num_loaded)
    return -(-most // chunk_experts(experts))


def num_chunks_ahead(experts: ExpertsSpec, num_tokens: int, num_loaded: int, skew: float) -> int:
    """Return how many chunks a visit reads before its ``num_tokens`` tokens are routed.

    Otherwise the disk would have nothing to read while a layer attends. There are none where too
    many of the experts that are read would not be needed. ``skew`` is that of the workload.
    """
    needed = experts.touched(num_tokens, skew, num_loaded / experts.num_experts)
    # The other chunks have room for all experts on disk only where so many may be needed.
    if needed < NEARLY_ALL * num_loaded or num_tokens * experts.experts_per_token < num_loaded:
        return 0
    return min(num_staged_chunks(experts), num_expert_chunks(experts, num_tokens, num_loaded))


def num_weight_pieces(num_batches: int) -> int:
    """Return the number of pieces in which a layer's weights are loaded.

    One piece is loaded beside each batch. A single batch has two, so that the result of the CPU's
    attention can pass between them.
    """
    return max(2, num_batches)
