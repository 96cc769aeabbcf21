"""Latent attention, as the configs and checkpoints of DeepSeek and its successors state it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from costmodel.families._rotary import rope_keys, rotary, yarn_scale
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES
from costmodel.model.attention_spec import AttentionSpec, LatentSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

LATENT_DEFAULTS: Mapping[str, object] = {
    **LLAMA_DEFAULTS,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
}


def latent_attention(
    config: HFConfig, *, is_interleaved: bool, takes_null: Sequence[str] = ()
) -> AttentionSpec:
    """Read latent attention.

    ``takes_null`` are keys that may be null: ``num_key_value_heads`` is then the number of heads,
    and ``v_head_dim`` is ``hidden_size`` over that number.
    """
    heads = config.whole("num_attention_heads")
    instead = {"num_key_value_heads": heads, "v_head_dim": config.whole("hidden_size") // heads}

    def read(key: str) -> int:
        return config.whole(key, instead_of_null=instead[key] if key in takes_null else None)

    if read("num_key_value_heads") != heads:
        raise config.refusal(
            "num_key_value_heads", config.get("num_key_value_heads"), f"{heads}, one for each head"
        )
    rope_dim = config.whole("qk_rope_head_dim")
    if rope_dim % 2:
        raise config.refusal("qk_rope_head_dim", rope_dim, "an even number")
    if config.raw.get("head_dim", rope_dim) != rope_dim:
        raise config.refusal("head_dim", config.raw["head_dim"], f"{rope_dim}, the rotated part")
    latent = LatentSpec(
        rank=config.whole("kv_lora_rank"),
        query_rank=None if config.get("q_lora_rank") is None else config.whole("q_lora_rank"),
        nope_dim=config.whole("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=read("v_head_dim"),
    )
    has_bias = config.flag("attention_bias")
    if has_bias and latent.query_rank is None:
        # Queries would have no bias, while what is stacked with them has one.
        raise config.refusal("attention_bias", True, "false without q_lora_rank")
    rotation = rotary(config, head_dim=rope_dim, is_interleaved=is_interleaved)
    if rotation.dim is not None:
        raise config.refusal("partial_rotary_factor", rotation.dim / rope_dim, "1")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=1,
        head_dim=latent.row_dim,
        rotary=replace(rotation, dim=rope_dim),
        scale=_scale(config, latent),
        qkv_bias=has_bias,
        output_bias=has_bias,
        latent=latent,
    )


def _scale(config: HFConfig, latent: LatentSpec) -> float:
    """Return the factor of the scores; scaled positions may change it too."""
    scale = float(latent.key_dim**-0.5)
    found = rope_keys(config)
    is_scaled = found.get("rope_type", found.get("type", "default")) != "default"
    if not is_scaled or not found.get("mscale_all_dim"):
        return scale
    factor = config.positive("factor", found.get("factor"))
    times = config.positive("mscale_all_dim", found["mscale_all_dim"])
    return scale * yarn_scale(factor, times) ** 2


def latent_modules(spec: ModelSpec) -> Mapping[str, tuple[str, ...]]:
    """Return the checkpoint's names; those of experts serve where there are any."""
    attention = "layers.{layer}.self_attn"
    latent = spec.layer(0).attention.latent
    assert latent is not None
    queries = "q_proj" if latent.query_rank is None else "q_a_proj"
    return {
        **V3_MODULES,
        "qkv": (f"{attention}.{queries}", f"{attention}.kv_a_proj_with_mqa"),
        "q_a_norm": (f"{attention}.q_a_layernorm",),
        "q_b": (f"{attention}.q_b_proj",),
        "kv_a_norm": (f"{attention}.kv_a_layernorm",),
        "kv_b": (f"{attention}.kv_b_proj",),
    }
