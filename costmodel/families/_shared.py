"""Readers of keys, and tables, that several families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from costmodel.families._rotary import DEFAULT_THETA, KINDS, rotary
from costmodel.families._windows import refuse_windows, with_windows
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import ACTIVATIONS, ExpertsSpec, MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import MAX_LAYERS, EmbeddingSpec, HeadSpec, ModelSpec, model_of_layers

# transformers' names of the supported activations, and ours.
HF_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
GATED_ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")
# Keys that change the computation in any family, with the values that are supported.
FOLLOWED: Mapping[str, tuple[object, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),
    "configuration_files": ([],),
    "text_config": (None,),
    "text_encoder": (None,),
    "decoder": (None,),
    "generator": (None,),
}


def check_followed(config: HFConfig) -> None:
    """Refuse keys that would change the computation of any family."""
    for key, values in FOLLOWED.items():
        if key in config.raw and not any(config.raw[key] == value for value in values):
            allowed = " or ".join("null" if v is None else str(v).lower() for v in values)
            raise config.refusal(key, config.raw[key], allowed)


def require(config: HFConfig, **flags: bool) -> None:
    """Refuse flags with a value other than the supported one."""
    for key, wanted in flags.items():
        if config.flag(key) != wanted:
            raise config.refusal(key, config.get(key), str(wanted).lower())


def activation(config: HFConfig, key: str, kinds: Sequence[str]) -> str:
    """Read an activation; it must be one of our ``kinds``."""
    found = config.get(key)
    names = [name for name, kind in HF_ACTIVATIONS.items() if kind in kinds]
    if found not in names:
        raise config.refusal(key, found, ", ".join(names))
    return HF_ACTIVATIONS[found]


def rms_norm(config: HFConfig) -> NormSpec:
    """Read the norm of the Llama family."""
    return NormSpec(kind="rms", eps=config.number("rms_norm_eps"))


def layer_norm(config: HFConfig, key: str = "layer_norm_eps", **fields: Any) -> NormSpec:
    """Read a LayerNorm."""
    return NormSpec(kind="layer", eps=config.number(key), **fields)


def soft_cap(config: HFConfig, key: str) -> float | None:
    """Read a soft cap; ``None`` where the config has null."""
    return None if config.get(key) is None else config.number(key)


def gated_mlp(
    config: HFConfig,
    size_key: str = "intermediate_size",
    *,
    times: int = 1,
    activation_key: str = "hidden_act",
    **fields: Any,
) -> MlpSpec:
    """Read an MLP of the Llama family, ``times`` as wide as the key says."""
    kind = activation(config, activation_key, GATED_ACTIVATIONS)
    return MlpSpec(size=times * config.whole(size_key), activation=kind, is_gated=True, **fields)


def plain_mlp(config: HFConfig, *, has_bias: bool) -> MlpSpec:
    """Read an MLP without a gate."""
    return MlpSpec(
        size=config.whole("intermediate_size"),
        activation=activation(config, "hidden_act", ACTIVATIONS),
        is_gated=False,
        has_bias=has_bias,
    )


def experts(
    config: HFConfig, *, count_keys: Sequence[str], size_key: str, **fields: Any
) -> ExpertsSpec:
    """Read a mixture of experts.

    ``count_keys`` are names for the number of experts. The first one that the file has is read,
    or else the default of the last one. ``size_key`` names the size of an expert.
    """
    found = [key for key in count_keys if key in config.raw]
    count = config.whole(found[0] if found else count_keys[-1])
    chosen = config.whole("num_experts_per_tok")
    if chosen > count:
        raise config.refusal("num_experts_per_tok", chosen, f"at most the {count} experts")
    return ExpertsSpec(
        num_experts=count, experts_per_token=chosen, expert=gated_mlp(config, size_key), **fields
    )


def sparse_layers(config: HFConfig) -> list[bool]:
    """Read which layers have experts from the keys of Qwen's configs."""
    step, dense = config.whole("decoder_sparse_step"), set(config.wholes("mlp_only_layers"))
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers(config))]


def absent(config: HFConfig, *keys: str) -> list[str]:
    """Return the keys that a config does not have.

    Some config classes have no ``head_dim``: they take an absent key, but not an explicit null.
    """
    return [key for key in keys if key not in config.raw]


def llama_attention(
    config: HFConfig,
    *,
    takes_null: Sequence[str] = (),
    theta: float = DEFAULT_THETA,
    rotary_share: float = 1.0,
    is_interleaved: bool = False,
    rotary_kinds: Mapping[str, str] = KINDS,
    **fields: Any,
) -> AttentionSpec:
    """Read the attention of the Llama family.

    ``takes_null`` are keys that may be null: ``num_key_value_heads`` is then the number of heads,
    and ``head_dim`` is ``hidden_size`` over the number of heads. ``theta`` and ``rotary_share`` are
    the base of the rotation, and the share of each head that is rotated, where the config names
    none.
    """
    heads = config.whole("num_attention_heads")
    instead = {"num_key_value_heads": heads, "head_dim": config.whole("hidden_size") // heads}

    def read(key: str) -> int:
        return config.whole(key, instead_of_null=instead[key] if key in takes_null else None)

    head_dim = read("head_dim")
    if head_dim % 2:
        raise config.refusal("head_dim", head_dim, "an even number")
    kv_heads = read("num_key_value_heads")
    if heads % kv_heads:
        raise config.refusal(
            "num_key_value_heads", kv_heads, f"a divisor of the {heads} of num_attention_heads"
        )
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=rotary(
            config,
            theta,
            head_dim=head_dim,
            share=rotary_share,
            is_interleaved=is_interleaved,
            kinds=rotary_kinds,
        ),
        **fields,
    )


def glm_attention(config: HFConfig, takes_null: Sequence[str] = ()) -> AttentionSpec:
    """Read the attention of GLM: half of each head is rotated, neighbours in pairs."""
    return llama_attention(
        config,
        takes_null=takes_null,
        rotary_share=0.5,
        is_interleaved=True,
        qkv_bias=config.flag("attention_bias"),
    )


def heads_in_groups(layer: LayerSpec) -> list[tuple[int, int]]:
    """Return the blocks of rows of one tensor with queries, keys and values, group by group.

    Each group has its queries, then one key and one value head (GPT-NeoX, Falcon).
    """
    attention = layer.attention
    dim, queries = attention.head_dim, attention.group_size * attention.head_dim
    starts = [group * (queries + 2 * dim) for group in range(attention.num_kv_heads)]
    return [
        *((start, queries) for start in starts),
        *((start + queries, dim) for start in starts),
        *((start + queries + dim, dim) for start in starts),
    ]


def decoder(
    config: HFConfig,
    layers: Sequence[LayerSpec],
    *,
    windows: Sequence[str] | None = None,
    embedding: EmbeddingSpec = EmbeddingSpec(),  # noqa: B008  # frozen
    final_norm: NormSpec | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    head_bias: bool = False,
    dtype: str = "bfloat16",
) -> ModelSpec:
    """Make a model of its layers and of the keys that all families share.

    Parameters
    ----------
    windows
        The kind of attention of each layer, as in ``layer_types``. ``None`` refuses windows.
    dtype
        Used where the config names none.
    """
    check_followed(config)
    if windows is None:
        refuse_windows(config)
    else:
        layers = with_windows(config, layers, windows)
    return model_of_layers(
        list(layers),
        name=config.name,
        family=config.family,
        vocab_size=config.whole("vocab_size"),
        hidden_size=config.whole("hidden_size"),
        max_positions=config.whole("max_position_embeddings"),
        embedding=embedding,
        final_norm=final_norm or rms_norm(config),
        head=HeadSpec(
            is_tied=config.flag("tie_word_embeddings"),
            scale=logit_scale,
            has_bias=head_bias,
            soft_cap=soft_cap,
        ),
        dtype=config.dtype or dtype,
    )


def equal_layers(config: HFConfig, layer: LayerSpec) -> list[LayerSpec]:
    """Repeat one layer as often as the config says."""
    return [layer] * num_layers(config)


def num_layers(config: HFConfig) -> int:
    """Read the number of layers."""
    count = config.whole("num_hidden_layers")
    if count > MAX_LAYERS:
        raise config.refusal("num_hidden_layers", count, f"at most {MAX_LAYERS}")
    return count
