"""What all schedules do of one layer: which rows go through it, and what follows attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.layer_spec import LayerSpec
from executor.model import layers
from executor.model.matrices import LayerWeights


def finish_layer(
    hidden: torch.Tensor,
    attended: torch.Tensor,
    weights: LayerWeights,
    layer: LayerSpec,
    *,
    has_feed_forward: bool,
) -> None:
    """Run a layer behind its attention, in place on ``hidden`` [batch, tokens, hidden_size].

    ``attended`` is [batch, tokens, ``output_size``]. Without ``has_feed_forward`` the second half
    is a layer of the schedule by itself.
    """
    if layer.is_parallel:
        layers.finish_parallel(hidden, attended, weights, layer)
        return
    layers.finish_attention(hidden, attended, weights, layer)
    if has_feed_forward:
        layers.feed_forward(hidden, weights, layer)


def finishes_all(kinds: Sequence[str], layer: int, *, scores_prompts: bool) -> bool:
    """Whether all tokens go through the whole of a layer. Of the last, the head takes only those
    behind which a token is chosen, unless prompts are scored."""
    return kinds[layer + 1] != "head" or scores_prompts
