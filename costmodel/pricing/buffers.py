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
# Without a GPU, sequences in step load chunks: one is loaded while the other is computed.
NUM_STAGED_CHUNKS = 2
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
    """Return the most experts of one chunk of loads on demand: half of those of a token."""
    return -(-experts.experts_per_token // NUM_STAGED_CHUNKS)


def num_expert_chunks(experts: ExpertsSpec, num_tokens: int, num_loaded: int) -> int:
    """Return the chunks in which a visit loads the experts of ``num_tokens`` tokens on demand.

    ``num_loaded`` experts of the layer are not in memory, so that no visit loads more.
    """
    most = min(num_tokens * experts.experts_per_token, num_loaded)
    return -(-most // chunk_experts(experts))


def num_weight_pieces(num_batches: int) -> int:
    """Return the number of pieces in which a layer's weights are loaded.

    One piece is loaded beside each batch. A single batch has two, so that the result of the CPU's
    attention can pass between them.
    """
    return max(2, num_batches)
