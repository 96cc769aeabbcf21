"""Sliding windows of attention, as configs state them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def window_size(config: HFConfig) -> int | None:
    """Read the number of tokens in a window; ``None`` where the config has null."""
    return None if config.get("sliding_window") is None else config.whole("sliding_window")


def refuse_windows(config: HFConfig) -> None:
    """Refuse layers with a sliding window."""
    if SLIDING in config.layer_types():
        raise config.refusal("layer_types", SLIDING, FULL)


def full_every(config: HFConfig, step: int) -> list[str]:
    """Read the kind of attention of each layer; where the config has none, every ``step``-th layer
    sees all tokens and the others have a window."""
    count = config.whole("num_hidden_layers")
    kinds = [SLIDING if (i + 1) % step else FULL for i in range(count)]
    return config.layer_types() or kinds


def patterned(config: HFConfig, default: int | None = None) -> list[str]:
    """Read the kind of attention of each layer; where the config has none, every
    ``sliding_window_pattern``-th layer sees all tokens.

    ``default`` is the pattern of an absent key in a family without a default of its own.
    """
    if kinds := config.layer_types():
        # The pattern may be a word beside them, and nothing reads it.
        return kinds
    key = "sliding_window_pattern"
    step = config.whole(key) if default is None or key in config.raw else default
    return full_every(config, step)


def windows_from(config: HFConfig, first: int) -> list[str]:
    """Read the kind of attention of each layer; where the config has none, the layers from
    ``first`` on have a window."""
    kinds = [SLIDING if i >= first else FULL for i in range(config.whole("num_hidden_layers"))]
    return config.layer_types() or kinds


def with_windows(
    config: HFConfig, layers: Sequence[LayerSpec], kinds: Sequence[str]
) -> list[LayerSpec]:
    """Give the config's window to the layers of the kind ``sliding_attention``.

    A window of all positions hides nothing, and is left out.
    """
    if SLIDING not in kinds:
        return list(layers)
    window = config.whole("sliding_window")
    if window >= config.whole("max_position_embeddings"):
        return list(layers)
    return [
        replace(layer, attention=replace(layer.attention, window=window))
        if kind == SLIDING
        else layer
        for layer, kind in zip(layers, kinds, strict=True)
    ]


def only_window(config: HFConfig, *, is_on: bool = True) -> list[str] | None:
    """Read the kinds of layers of a family with the window in all of them or in none."""
    if window_size(config) is None or not is_on:
        return None
    return [SLIDING] * config.whole("num_hidden_layers")


def qwen_windows(config: HFConfig) -> list[str] | None:
    """Read the kinds of layers; without ``layer_types``, those from ``max_window_layers`` on have
    a window."""
    first = config.whole("max_window_layers", least=0)
    if not config.flag("use_sliding_window") or window_size(config) is None:
        return None
    return windows_from(config, first)
