"""Model families as data: the numbers a decoder computes with, and what its tensors are called.

One generic decoder serves every family; this is the table that describes them. To add a family,
add its names here and its shapes to ``costmodel.model_spec`` and ``costmodel.layout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from costmodel.model_spec import ModelSpec
from profiles.errors import InputError

OPT_NORM_EPS = 1e-5
ROPE_KINDS = ("default", "linear", "llama3")
ACTIVATIONS = {
    "opt": ("relu", "gelu"),
    "llama": ("silu", "relu"),
    "mistral": ("silu", "relu"),
    "qwen2": ("silu", "relu"),
    "qwen3": ("silu", "relu"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")

# Module names of ours -> the checkpoint's modules whose rows are stacked to make it.
_LLAMA_MODULES: Mapping[str, tuple[str, ...]] = {
    "tokens": ("embed_tokens",),
    "attention_norm": ("layers.{}.input_layernorm",),
    "qkv": (
        "layers.{}.self_attn.q_proj",
        "layers.{}.self_attn.k_proj",
        "layers.{}.self_attn.v_proj",
    ),
    "q_norm": ("layers.{}.self_attn.q_norm",),
    "k_norm": ("layers.{}.self_attn.k_norm",),
    "output": ("layers.{}.self_attn.o_proj",),
    "mlp_norm": ("layers.{}.post_attention_layernorm",),
    "gate_up": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    "down": ("layers.{}.mlp.down_proj",),
    "final_norm": ("norm",),
}
_OPT_MODULES: Mapping[str, tuple[str, ...]] = {
    "tokens": ("embed_tokens",),
    "positions": ("embed_positions",),
    "attention_norm": ("layers.{}.self_attn_layer_norm",),
    "qkv": _LLAMA_MODULES["qkv"],
    "output": ("layers.{}.self_attn.out_proj",),
    "mlp_norm": ("layers.{}.final_layer_norm",),
    "up": ("layers.{}.fc1",),
    "down": ("layers.{}.fc2",),
    "final_norm": ("final_layer_norm",),
}
MODULES = {
    "opt": _OPT_MODULES,
    "llama": _LLAMA_MODULES,
    "mistral": _LLAMA_MODULES,
    "qwen2": _LLAMA_MODULES,
    "qwen3": _LLAMA_MODULES,
}
# Checkpoints of a causal model have the first prefix, those of the bare decoder the second.
PREFIXES = {
    "opt": ("model.decoder.", "decoder."),
    "llama": ("model.", ""),
    "mistral": ("model.", ""),
    "qwen2": ("model.", ""),
    "qwen3": ("model.", ""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: its base and how its frequencies are scaled.

    The last three numbers are read by the ``llama3`` kind only, ``factor`` also by ``linear``.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise InputError("rope scaling", got=repr(self.kind), allowed=", ".join(ROPE_KINDS))
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"rope {name}", got=getattr(self, name), allowed="above 0")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                "rope high_freq_factor",
                got=self.high_freq_factor,
                allowed=f"more than low_freq_factor {self.low_freq_factor}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The numbers that a decoder computes with, beside its shapes.

    Parameters
    ----------
    norm_eps
        Added to the variance in every norm.
    activation
        ``silu``, ``relu`` or ``gelu`` (exact).
    rope
        Rotary positions, or ``None`` where positions are learned and added (OPT).
    qk_norm
        Whether queries and keys are normalised per head before they are rotated.
    """

    norm_eps: float
    activation: str
    rope: Rope | None
    qk_norm: bool = False


def default_decoder_config(spec: ModelSpec) -> DecoderConfig:
    """Return the numbers that a family has where its config says nothing."""
    return decoder_config({}, spec)


def decoder_config(config: Mapping[str, Any], spec: ModelSpec) -> DecoderConfig:
    """Read the numbers out of a Hugging Face ``config.json``; refuse what would be ignored."""
    _refuse_unsupported(config, spec)
    is_opt = spec.family == "opt"
    key = "activation_function" if is_opt else "hidden_act"
    activation = config.get(key, ACTIVATIONS[spec.family][0])
    if activation not in ACTIVATIONS[spec.family]:
        raise _refusal(spec, key, activation, ", ".join(ACTIVATIONS[spec.family]))
    eps = OPT_NORM_EPS if is_opt else _number(config, "rms_norm_eps", 1e-6, spec)
    return DecoderConfig(
        norm_eps=eps,
        activation=activation,
        rope=None if is_opt else _rope(config, spec),
        qk_norm=spec.family == "qwen3",
    )


def name_parts(spec: ModelSpec, name: str, layer: int, prefix: str) -> tuple[str, ...]:
    """Translate one of our tensor names into those that a checkpoint stacks to make it.

    Parameters
    ----------
    name
        A name of ``costmodel.layout``, such as ``qkv.weight``.
    layer
        Number of the decoder layer, from zero; not read for tensors outside of them.
    prefix
        One of ``PREFIXES`` of the family.
    """
    module, _, kind = name.rpartition(".")
    if module == "head":
        if not spec.tied_embeddings:
            return (f"lm_head.{kind}",)
        module = "tokens"
    return tuple(f"{prefix}{part.format(layer)}.{kind}" for part in MODULES[spec.family][module])


def part_rows(spec: ModelSpec, name: str, num_rows: int) -> tuple[int, ...]:
    """Return the rows that each part of a stacked tensor of ``num_rows`` rows has."""
    module = name.rpartition(".")[0]
    if module == "qkv":
        return (spec.query_size, spec.kv_size, spec.kv_size)
    if module == "gate_up":
        return (spec.ffn_size, spec.ffn_size)
    return (num_rows,)


def _refuse_unsupported(config: Mapping[str, Any], spec: ModelSpec) -> None:
    for key, wanted in _required_values(spec).items():
        if config.get(key, wanted) != wanted:
            raise _refusal(spec, key, config[key], str(wanted).lower())
    if config.get("quantization_config"):
        raise _refusal(spec, "quantization_config", "a quantized checkpoint", "plain weights")
    for layer_type in config.get("layer_types") or ():
        if layer_type not in LAYER_TYPES:
            raise _refusal(spec, "layer_types", layer_type, ", ".join(LAYER_TYPES))
    if spec.family != "opt" and spec.head_dim % 2:
        raise _refusal(spec, "head_dim", spec.head_dim, "an even number")
    if spec.family == "opt" and spec.hidden_size != spec.query_size:
        raise _refusal(spec, "hidden_size", spec.hidden_size, "a multiple of the heads")


def _required_values(spec: ModelSpec) -> Mapping[str, object]:
    if spec.family == "opt":
        return {"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}
    return {
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        # Qwen2 has biases on its query, key and value whatever its config says; in the other
        # families the key would put one on the output projection as well.
        "attention_bias": spec.family == "qwen2",
    }


def _rope(config: Mapping[str, Any], spec: ModelSpec) -> Rope:
    # transformers 5 writes everything into rope_parameters, older ones scatter it.
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping) or any(isinstance(v, Mapping) for v in found.values()):
        raise _refusal(spec, "rope_parameters", "one set per kind of layer", "one for all layers")
    kind = str(found.get("rope_type") or found.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise _refusal(spec, "rope scaling", kind, ", ".join(ROPE_KINDS))
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(
            spec, "partial_rotary_factor", found["partial_rotary_factor"], "1 (whole heads)"
        )
    theta = _number(config, "rope_theta", 10000.0, spec)
    if kind == "default":
        return Rope(theta=_number(found, "rope_theta", theta, spec))
    if "factor" not in found:
        raise _refusal(spec, f"rope scaling {kind!r}", "no factor", "a factor above 0")
    positions = _number(config, "max_position_embeddings", 8192, spec)
    return Rope(
        theta=_number(found, "rope_theta", theta, spec),
        kind=kind,
        factor=_number(found, "factor", 1.0, spec),
        low_freq_factor=_number(found, "low_freq_factor", 1.0, spec),
        high_freq_factor=_number(found, "high_freq_factor", 4.0, spec),
        original_max_positions=int(
            _number(found, "original_max_position_embeddings", positions, spec)
        ),
    )


def _number(config: Mapping[str, Any], key: str, default: float, spec: ModelSpec) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _refusal(spec, key, value, "a number above 0")
    return float(value)


def _refusal(spec: ModelSpec, key: str, got: object, allowed: str) -> InputError:
    return InputError(
        f"{key} in config of {spec.name}",
        got=got if isinstance(got, str) and " " in got else repr(got),
        allowed=allowed,
    )
