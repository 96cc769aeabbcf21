"""Readers for families whose config class is that of Llama with other defaults."""

from __future__ import annotations

from costmodel.families._plain import equal_heads
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
    equal_heads(config)
