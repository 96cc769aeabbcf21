"""Architectures of GGUF: the family of each, and what its files leave unsaid.

Which keys exist, what an absent one means and how positions are rotated is as in llama.cpp
0.3.36 of ``llama-cpp-python`` (``src/models``, ``llama_model_rope_type``, ``conversion``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Keys of all architectures, without the prefix, and what a config calls them.
COMMON_KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LAYER = {"attention.layer_norm_epsilon": "layer_norm_eps"}
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# Values of ``expert_gating_func``.
SOFTMAX, SIGMOID = 1, 2
# Mixtures after DeepSeek V3.
V3_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
}
# Models after GPT-2.
GPT2 = {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"}
# Keys that files may lack, as those with an implied value: what they switch on is then off,
# or as in the family's models.
OPTIONAL = (
    *EXPERTS,
    *SOFT_CAPS,
    "feed_forward_length",
    "attention.head_count_kv",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "attention.clamp_kqv",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_group_count",
    "expert_group_used_count",
    "leading_dense_block_count",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One ``general.architecture``.

    Parameters
    ----------
    family
        The file of ``costmodel.families`` that describes it.
    keys
        Its keys besides ``COMMON_KEYS``, without the prefix, and what a config calls them.
    variants
        Other families: the one of the first key here that is above 0 in the file.
    is_interleaved
        Whether neighbours form the pairs of a rotation. Converters reorder rows of queries and
        keys for that, even where the model's own pairs are half a head apart.
    has_added_one
        Whether 1 has been added to the weights of norms.
    implied
        Values of a config that the files leave unsaid.
    flags
        For a flag of a config: a tensor of the first layer, and whether the flag says that it is
        there or that it is not.
    fixed
        Keys that change the computation, with the values that are supported.
    unread
        Keys that llama.cpp does not read.
    window_theta
        Where layers with a window have a rotation of their own, without scaling: its base where no
        key says it. Where there are variants, only these have it.
    share_key
        The key of a config for the share of a head that is rotated.
    rope_keys
        Keys of the file, and what ``rope_parameters`` of a config call them.
    """

    family: str
    keys: Mapping[str, str]
    variants: Mapping[str, str] = field(default_factory=dict)
    is_interleaved: bool = False
    has_added_one: bool = False
    implied: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    window_theta: float | None = None
    share_key: str = "partial_rotary_factor"
    rope_keys: Mapping[str, str] = field(default_factory=dict)


ARCHS: Mapping[str, Arch] = {
    "llama": Arch(
        family="llama",
        keys={**RMS, **EXPERTS},
        variants={"expert_count": "mixtral"},
        is_interleaved=True,
        # Files of Mistral 7B 0.1 have one; llama.cpp attends to all tokens.
        unread=("attention.sliding_window", "expert_feed_forward_length"),
    ),
    "qwen2": Arch(family="qwen2", keys=RMS),
    "qwen3": Arch(family="qwen3", keys=RMS),
    "qwen2moe": Arch(
        family="qwen2_moe",
        keys={
            **RMS,
            **EXPERTS,
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        fixed={"expert_gating_func": (SOFTMAX,), "expert_weights_norm": (False,)},
    ),
    "qwen3moe": Arch(
        family="qwen3_moe",
        keys={**RMS, **EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"},
        implied={"norm_topk_prob": True},
        fixed={"expert_gating_func": (SOFTMAX,), "expert_weights_norm": (True,)},
    ),
    "gemma": Arch(family="gemma", keys=RMS, has_added_one=True),
    "gemma2": Arch(
        family="gemma2",
        keys={**RMS, **WINDOW, **SOFT_CAPS},
        implied={"sliding_window": 4096},
        has_added_one=True,
    ),
    "gemma3": Arch(
        family="gemma3_text",
        keys={
            **RMS,
            **WINDOW,
            "final_logit_softcapping": "final_logit_softcapping",
        },
        implied={"sliding_window": None},
        has_added_one=True,
        window_theta=10000.0,
    ),
    "phi3": Arch(
        family="phi3",
        keys=RMS,
        # llama.cpp does without the windows of these models.
        unread=("attention.sliding_window",),
    ),
    "gpt-oss": Arch(
        family="gpt_oss",
        keys={**RMS, **WINDOW, **EXPERTS, "expert_feed_forward_length": "intermediate_size"},
        # llama.cpp rounds the bounds of the blended frequencies, the model does not.
        implied={"rope_parameters": {"truncate": False}},
        fixed={"expert_gating_func": (SOFTMAX,)},
    ),
    "smollm3": Arch(family="smollm3", keys=RMS, is_interleaved=True),
    "granite": Arch(
        family="granite",
        keys={**RMS, **MULTIPLIERS},
        is_interleaved=True,
        fixed={"rope.scaling.finetuned": (True,)},
    ),
    "granitemoe": Arch(
        family="granitemoe",
        keys={
            **RMS,
            **MULTIPLIERS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        },
        variants={"expert_shared_feed_forward_length": "granitemoeshared"},
        is_interleaved=True,
        fixed={"rope.scaling.finetuned": (True,)},
        unread=("expert_feed_forward_length",),
    ),
    "olmo2": Arch(
        family="olmo2",
        keys={**RMS, **WINDOW},
        variants={"attention.sliding_window": "olmo3"},
        implied={"sliding_window": None},
        window_theta=500000.0,
    ),
    "olmoe": Arch(
        family="olmoe", keys={**RMS, **EXPERTS}, fixed={"expert_gating_func": (SOFTMAX,)}
    ),
    "starcoder2": Arch(family="starcoder2", keys={"attention.layer_norm_epsilon": "norm_epsilon"}),
    "stablelm": Arch(
        family="stablelm",
        keys=LAYER,
        flags={
            "qk_layernorm": ("attn_q_norm.weight", True),
            "use_parallel_residual": ("ffn_norm.weight", False),
        },
        unread=("use_parallel_residual",),
    ),
    "glm4": Arch(family="glm4", keys=RMS, is_interleaved=True),
    "command-r": Arch(
        family="cohere",
        keys={**LAYER, "logit_scale": "logit_scale"},
        is_interleaved=True,
        flags={"use_qk_norm": ("attn_q_norm.weight", True)},
    ),
    "cohere2": Arch(
        family="cohere2",
        keys={**LAYER, **WINDOW, "logit_scale": "logit_scale"},
        is_interleaved=True,
    ),
    "glm4moe": Arch(
        family="glm4_moe",
        keys={**RMS, **V3_EXPERTS},
        flags={"use_qk_norm": ("attn_q_norm.weight", True)},
        fixed={"expert_gating_func": (SIGMOID,)},
    ),
    "dots1": Arch(
        family="dots1",
        keys={**RMS, **V3_EXPERTS},
        implied={"sliding_window": None},
        fixed={"expert_gating_func": (SIGMOID,)},
    ),
    "minimax-m2": Arch(
        family="minimax_m2",
        keys={**RMS, **EXPERTS, "expert_feed_forward_length": "intermediate_size"},
        fixed={"expert_gating_func": (SIGMOID,)},
    ),
    "seed_oss": Arch(family="seed_oss", keys=RMS),
    "arcee": Arch(family="arcee", keys=RMS, is_interleaved=True),
    "ernie4_5": Arch(family="ernie4_5", keys=RMS, is_interleaved=True),
    "ernie4_5-moe": Arch(
        family="ernie4_5_moe",
        keys={
            **RMS,
            "expert_count": "moe_num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "leading_dense_block_count": "moe_layer_start_index",
            "interleave_moe_layer_step": "moe_layer_interval",
        },
        is_interleaved=True,
        # The width of the shared expert is that of its tensors.
        unread=("expert_shared_feed_forward_length",),
    ),
    "mistral3": Arch(
        family="llama",
        keys=RMS,
        variants={"attention.temperature_scale": "ministral3"},
        is_interleaved=True,
        implied={"rope_parameters": {"mscale": 1.0}},
        rope_keys={
            "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
            "attention.temperature_scale": "llama_4_scaling_beta",
        },
    ),
    "exaone": Arch(family="exaone", keys=RMS),
    "exaone4": Arch(family="exaone4", keys={**RMS, **WINDOW}, implied={"sliding_window": None}),
    "hunyuan-dense": Arch(family="hunyuan_v1_dense", keys=RMS),
    "nemotron": Arch(
        family="nemotron",
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        has_added_one=True,
        unread=("attention.layer_norm_rms_epsilon",),
    ),
    "olmo": Arch(
        family="olmo",
        keys={"attention.clamp_kqv": "clip_qkv"},
        is_interleaved=True,
        unread=("attention.layer_norm_epsilon",),
    ),
    "falcon": Arch(
        family="falcon",
        keys={
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "attention.head_count_kv": "num_kv_heads",
            "feed_forward_length": "ffn_hidden_size",
        },
        implied={"multi_query": False},
    ),
    "gptneox": Arch(
        family="gpt_neox",
        keys={**LAYER, "use_parallel_residual": "use_parallel_residual"},
        share_key="rotary_pct",
    ),
    "gpt2": Arch(family="gpt2", keys=GPT2),
    "starcoder": Arch(family="gpt_bigcode", keys=GPT2),
    "bloom": Arch(family="bloom", keys={"attention.layer_norm_epsilon": "layer_norm_epsilon"}),
}
