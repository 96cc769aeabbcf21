"""Readers for families whose config class is that of Llama with other defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from costmodel.families._rotary import DEFAULT_THETA
from costmodel.families._shared import llama_attention, rms_norm
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec


def llama_layer(
    config: HFConfig,
    mlp: MlpSpec,
    *,
    norm: NormSpec | None = None,
    theta: float = DEFAULT_THETA,
    has_bias: bool,
) -> LayerSpec:
    """Read a layer of Llama with another MLP, norm or base of the rotation."""
    check_head_sizes(config)
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", "head_dim"),
        theta=theta,
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    return LayerSpec(attention=attention, mlp=mlp, norm=norm or rms_norm(config))


def check_head_sizes(config: HFConfig) -> None:
    """Refuse a hidden size that the heads do not divide, even beside a ``head_dim``."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if hidden % heads:
        raise config.refusal("hidden_size", hidden, f"a multiple of the {heads} heads")


def renamed(config: HFConfig, names: Mapping[str, str]) -> HFConfig:
    """Return a config with other names for some of its keys.

    ``names`` has the common name of each. As in transformers, the other name wins where a file has
    both.
    """
    raw = {key: value for key, value in config.raw.items() if key not in names}
    found = {own: config.raw[key] for key, own in names.items() if key in config.raw}
    return replace(config, raw=raw | found)


def with_rotary_keys(config: HFConfig, keys: Mapping[str, Any]) -> HFConfig:
    """Return a config with the ``rope_parameters`` that its class has where a file has none."""
    if config.raw.get("rope_parameters") is not None:
        return config
    return replace(config, raw={**config.raw, "rope_parameters": dict(keys)})
