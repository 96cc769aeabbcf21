"""Sliding windows of attention, as configs state them.

Within one window, attention is plain attention. So a window limits the positions of a model, and
longer contexts are refused.
"""

from __future__ import annotations

from costmodel.model.hf_config import HFConfig


def window_size(config: HFConfig) -> int | None:
    """Read the number of tokens in a window; ``None`` where the config has null."""
    return None if config.get("sliding_window") is None else config.whole("sliding_window")


def refuse_windows(config: HFConfig) -> None:
    """Refuse layers with a sliding window."""
    if "sliding_attention" in config.layer_types():
        raise config.refusal("layer_types", "sliding_attention", "full_attention")


def only_window(config: HFConfig, *, is_on: bool = True) -> int | None:
    """Read the window of a family that uses it in all layers or in none."""
    window = window_size(config)
    if window is None or not is_on:
        refuse_windows(config)
        return None
    return window


def qwen_window(config: HFConfig) -> int | None:
    """Read the window of a family that uses it in the layers from ``max_window_layers`` on."""
    kinds = config.layer_types()
    window = window_size(config)
    if not config.flag("use_sliding_window"):
        window = None
    first = config.whole("max_window_layers", least=0)
    kinds = kinds or ["sliding_attention"] * (first < config.whole("num_hidden_layers"))
    if config.raw.get("layer_types") and window is None:
        refuse_windows(config)
    return window if "sliding_attention" in kinds else None
