"""What the families' files share: keys that mean the same to many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import (
    ROTARY_KINDS,
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    RotarySpec,
)
from costmodel.model.spec import MAX_LAYERS, EmbeddingSpec, HeadSpec, ModelSpec, model_of_layers

# transformers' names of the activations that there are, and ours.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
# Keys that change what transformers computes, with the values that are followed here.
FOLLOWED: Mapping[str, tuple[object, ...]] = {
    "is_causal": (True,),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),
    "configuration_files": ([],),
    "text_config": (None,),
    "text_encoder": (None,),
    "decoder": (None,),
    "generator": (None,),
}
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN2_DEFAULTS: Mapping[str, Any] = {
    **LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
LLAMA_MODULES: Mapping[str, tuple[str, ...]] = {
    "tokens": ("embed_tokens",),
    "attention_norm": ("layers.{layer}.input_layernorm",),
    "qkv": (
        "layers.{layer}.self_attn.q_proj",
        "layers.{layer}.self_attn.k_proj",
        "layers.{layer}.self_attn.v_proj",
    ),
    "q_norm": ("layers.{layer}.self_attn.q_norm",),
    "k_norm": ("layers.{layer}.self_attn.k_norm",),
    "output": ("layers.{layer}.self_attn.o_proj",),
    "mlp_norm": ("layers.{layer}.post_attention_layernorm",),
    "gate_up": ("layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.up_proj"),
    "down": ("layers.{layer}.mlp.down_proj",),
    "final_norm": ("norm",),
}
# With a mixture of experts; a family's dense layers are those of Llama.
EXPERTS_MODULES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_MODULES,
    "router": ("layers.{layer}.mlp.gate",),
    "expert_gate_up": (
        "layers.{layer}.mlp.experts.{expert}.gate_proj",
        "layers.{layer}.mlp.experts.{expert}.up_proj",
    ),
    "expert_down": ("layers.{layer}.mlp.experts.{expert}.down_proj",),
}
# Of most families: where a config names no base of the rotation.
DEFAULT_THETA = 10000.0


def check_followed(config: HFConfig) -> None:
    """Refuse keys of any family that would change what is computed."""
    for key, values in FOLLOWED.items():
        if key in config.raw and not any(config.raw[key] == value for value in values):
            allowed = " or ".join("null" if v is None else str(v).lower() for v in values)
            raise config.refusal(key, config.raw[key], allowed)


def require(config: HFConfig, **flags: bool) -> None:
    """Refuse flags that have another value than the one that is followed."""
    for key, wanted in flags.items():
        if config.flag(key) != wanted:
            raise config.refusal(key, config.get(key), str(wanted).lower())


def activation(config: HFConfig, key: str, kinds: Sequence[str]) -> str:
    """Read an activation, one of our ``kinds``."""
    found = config.get(key)
    names = [name for name, kind in ACTIVATIONS.items() if kind in kinds]
    if found not in names:
        raise config.refusal(key, found, ", ".join(names))
    return ACTIVATIONS[found]


def rms_norm(config: HFConfig) -> NormSpec:
    """Read the norm of the Llama family."""
    return NormSpec(kind="rms", eps=config.number("rms_norm_eps"))


def gated_mlp(config: HFConfig, size_key: str = "intermediate_size", **fields: Any) -> MlpSpec:
    """Read an MLP of the Llama family."""
    kind = activation(config, "hidden_act", ("silu", "relu"))
    return MlpSpec(size=config.whole(size_key), activation=kind, is_gated=True, **fields)


def experts(
    config: HFConfig, *, count_keys: Sequence[str], size_key: str, **fields: Any
) -> ExpertsSpec:
    """Read a mixture of experts.

    ``count_keys`` are names of the number of experts, of which the first that is there is read, or
    else the last one's default; ``size_key`` is the size of an expert.
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
    """Read which layers have experts, as Qwen's configs say it."""
    step, dense = config.whole("decoder_sparse_step"), set(config.wholes("mlp_only_layers"))
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers(config))]


def absent(config: HFConfig, *keys: str) -> list[str]:
    """Return the keys that a config does not have.

    Some config classes have no head size: null is not one, unless the key is absent.
    """
    return [key for key in keys if key not in config.raw]


def llama_attention(
    config: HFConfig,
    *,
    takes_null: Sequence[str] = (),
    theta: float = DEFAULT_THETA,
    **fields: Any,
) -> AttentionSpec:
    """Read the attention of the Llama family.

    ``takes_null`` are keys that may be null: ``num_key_value_heads`` is then the number of heads,
    and ``head_dim`` what divides ``hidden_size``. ``theta`` is the base of the rotation where the
    config names none.
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
        rotary=rotary(config, theta),
        **fields,
    )


def decoder(
    config: HFConfig,
    layers: Sequence[LayerSpec],
    *,
    window: int | None = None,
    embedding: EmbeddingSpec = EmbeddingSpec(),  # noqa: B008  # frozen
    final_norm: NormSpec | None = None,
    logit_scale: float = 1.0,
    dtype: str = "bfloat16",
) -> ModelSpec:
    """Put a model together. ``dtype`` is the one where the config names none.

    Attention inside one window is plain attention; positions beyond it are refused.
    """
    check_followed(config)
    positions = config.whole("max_position_embeddings")
    return model_of_layers(
        list(layers),
        name=config.name,
        family=config.family,
        vocab_size=config.whole("vocab_size"),
        hidden_size=config.whole("hidden_size"),
        max_positions=positions if window is None else min(positions, window),
        embedding=embedding,
        final_norm=final_norm or rms_norm(config),
        head=HeadSpec(is_tied=config.flag("tie_word_embeddings"), scale=logit_scale),
        dtype=config.dtype or dtype,
    )


def equal_layers(config: HFConfig, layer: LayerSpec) -> list[LayerSpec]:
    """Return as many equal layers as the config says."""
    return [layer] * num_layers(config)


def num_layers(config: HFConfig) -> int:
    """Read how many layers there are."""
    count = config.whole("num_hidden_layers")
    if count > MAX_LAYERS:
        raise config.refusal("num_hidden_layers", count, f"at most {MAX_LAYERS}")
    return count


def refuse_windows(config: HFConfig) -> None:
    """Check kinds of layers in a family that reads no window."""
    if "sliding_attention" in config.layer_types():
        raise config.refusal("layer_types", "sliding_attention", "full_attention")


def only_window(config: HFConfig, *, is_on: bool = True) -> int | None:
    """Read the window of families that have it in all layers or in none."""
    window = None if config.get("sliding_window") is None else config.whole("sliding_window")
    if window is None or not is_on:
        refuse_windows(config)
        return None
    return window


def mistral_window(config: HFConfig) -> int | None:
    """Read the window of families that have one in all layers, unless kinds of layers say less."""
    kinds = config.layer_types()
    window = None if config.get("sliding_window") is None else config.whole("sliding_window")
    if window is None:
        # With kinds of layers, transformers takes such a model for one that needs a window.
        if config.family == "mistral" and "layer_types" in config.raw:
            raise config.refusal("sliding_window", None, "a number beside layer_types")
        refuse_windows(config)
        return None
    return window if not kinds or "sliding_attention" in kinds else None


def qwen_window(config: HFConfig) -> int | None:
    """Read the window of families that have it from some layer on, where it is switched on."""
    kinds = config.layer_types()
    window = None if config.get("sliding_window") is None else config.whole("sliding_window")
    if not config.flag("use_sliding_window"):
        window = None
    first = config.whole("max_window_layers", least=0)
    kinds = kinds or ["sliding_attention"] * (first < config.whole("num_hidden_layers"))
    if config.raw.get("layer_types") and window is None:
        refuse_windows(config)
    return window if "sliding_attention" in kinds else None


def rotary(config: HFConfig, theta: float = DEFAULT_THETA) -> RotarySpec:
    """Read rotary positions, with every place where the keys may be; ``theta`` is the base where
    none of them has it."""
    # The older key wins, as in transformers 5, and the newer one is then not read at all.
    found = config.raw.get("rope_parameters")
    found = {} if found is None else found
    for key, values in (
        ("rope_parameters", found),
        ("rope_scaling", config.raw.get("rope_scaling") or found),
    ):
        if not isinstance(values, Mapping):
            raise config.refusal(key, values, "an object with rope_type and its numbers")
        if any(isinstance(value, Mapping) for value in values.values()):
            raise config.refusal(key, "one set per kind of layer", "one for all")
        found = values
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROTARY_KINDS:
        raise config.refusal("rope_type", kind, ", ".join(ROTARY_KINDS))
    name = "partial_rotary_factor"
    share = found[name] if name in found else config.raw.get(name) or 1
    if share != 1:
        raise config.refusal(name, share, "1 (whole heads)")
    base = found.get("rope_theta", config.raw.get("rope_theta", theta))
    spec = RotarySpec(theta=config.positive("rope_theta", base))
    return spec if kind == "default" else _scaled(config, found, replace(spec, kind=kind))


def _scaled(config: HFConfig, found: Mapping[str, Any], spec: RotarySpec) -> RotarySpec:
    names = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (spec.kind == "llama3")
    for name in names:
        if name not in found:
            raise config.refusal(f"rope scaling {spec.kind!r}", f"no {name}", f"a {name} above 0")
    if spec.kind == "linear":
        return replace(spec, factor=config.positive("factor", found["factor"]))
    # Outside of the scaling's own keys this one wins, unlike all others.
    name = "original_max_position_embeddings"
    positions = found.get(name, config.whole("max_position_embeddings"))
    positions = config.raw.get(name, positions)
    low, high = (config.positive(name, found[name]) for name in names[1:])
    if high <= low:
        raise config.refusal("high_freq_factor", high, f"more than low_freq_factor {low}")
    return replace(
        spec,
        factor=config.positive("factor", found["factor"]),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=config.positive(name, positions),
    )
