"""Model families as data: the numbers a decoder computes with, and what its tensors are called.

One generic decoder serves every family; this is the table that describes them. To add a family,
add its names here, the defaults of its config to ``costmodel.families.hf_config.DEFAULTS``, and
its shapes to ``costmodel.model.model_spec`` and ``costmodel.model.layout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from costmodel.families.hf_config import HFConfig
from costmodel.model.model_spec import ModelSpec
from profiles.errors import InputError

OPT_NORM_EPS = 1e-5
ROPE_KINDS = ("default", "linear", "llama3")
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
# Where the decoder is in transformers' causal model.
PREFIXES = {
    "opt": "model.decoder.",
    "llama": "model.",
    "mistral": "model.",
    "qwen2": "model.",
    "qwen3": "model.",
}
BASE_PREFIX = "model."
HEAD_NAME = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: its base and how its frequencies are scaled.

    The last three numbers are read by the ``llama3`` kind only, ``factor`` also by ``linear``.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: float = 8192

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


def decoder_config(raw: Mapping[str, Any], spec: ModelSpec) -> DecoderConfig:
    """Read the numbers out of a Hugging Face ``config.json``; refuse what would be ignored.

    An empty ``raw`` gives the family's defaults.
    """
    config = HFConfig(family=spec.family, name=spec.name, raw=raw)
    _refuse_unsupported(config, spec)
    is_opt = spec.family == "opt"
    return DecoderConfig(
        norm_eps=OPT_NORM_EPS if is_opt else config.number("rms_norm_eps"),
        activation=_activation(config),
        rope=None if is_opt else _rope(config),
        qk_norm=spec.family == "qwen3",
    )


def name_parts(spec: ModelSpec, name: str, layer: int) -> tuple[str, ...]:
    """Translate one of our tensor names into those that are stacked to make it.

    The names are those in transformers' causal model; see ``stored_names``.

    Parameters
    ----------
    name
        A name of ``costmodel.model.layout``, such as ``qkv.weight``.
    layer
        Number of the decoder layer, from zero; not read for tensors outside of them.
    """
    module, _, kind = name.rpartition(".")
    if module == "head":
        if not spec.tied_embeddings:
            return (HEAD_NAME,)
        module = "tokens"
    prefix = PREFIXES[spec.family]
    return tuple(f"{prefix}{part.format(layer)}.{kind}" for part in MODULES[spec.family][module])


def stored_names(name: str) -> tuple[str, ...]:
    """Return the names under which transformers finds a tensor of its causal model in a file: its
    own, and those with one prefix of the base model more or less."""
    return tuple(dict.fromkeys((name, BASE_PREFIX + name, name.removeprefix(BASE_PREFIX))))


def part_rows(spec: ModelSpec, name: str, num_rows: int) -> tuple[int, ...]:
    """Return the rows that each part of a stacked tensor of ``num_rows`` rows has."""
    module = name.rpartition(".")[0]
    if module == "qkv":
        return (spec.query_size, spec.kv_size, spec.kv_size)
    if module == "gate_up":
        return (spec.ffn_size, spec.ffn_size)
    return (num_rows,)


def _refuse_unsupported(config: HFConfig, spec: ModelSpec) -> None:
    for key, values in FOLLOWED.items():
        if key in config.raw and not any(config.raw[key] == value for value in values):
            allowed = " or ".join("null" if v is None else str(v).lower() for v in values)
            raise config.refusal(key, config.raw[key], allowed)
    for key, wanted in _required_flags(spec.family).items():
        if config.flag(key) != wanted:
            raise config.refusal(key, config.get(key), str(wanted).lower())
    if spec.family != "opt" and spec.head_dim % 2:
        raise config.refusal("head_dim", spec.head_dim, "an even number")
    if spec.family == "opt" and spec.hidden_size != spec.query_size:
        raise config.refusal("hidden_size", spec.hidden_size, "a multiple of the heads")


def _required_flags(family: str) -> Mapping[str, bool]:
    if family == "opt":
        return {"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}
    # In the families that read it, this key puts a bias on the output projection as well.
    flags = {"attention_bias": False} if family in ("llama", "qwen3") else {}
    return flags | {"mlp_bias": False} if family == "llama" else flags


def _activation(config: HFConfig) -> str:
    is_opt = config.family == "opt"
    key = "activation_function" if is_opt else "hidden_act"
    found = config.get(key)
    kinds = ("relu", "gelu") if is_opt else ("silu", "relu")
    names = [name for name, kind in ACTIVATIONS.items() if kind in kinds]
    if found not in names:
        raise config.refusal(key, found, ", ".join(names))
    return ACTIVATIONS[found]


def _rope(config: HFConfig) -> Rope:
    # The older key wins, as in transformers 5, and the newer one is then not read at all.
    found = config.raw.get("rope_parameters")
    found = {} if found is None else found
    for values in (found, config.raw.get("rope_scaling") or found):
        if not isinstance(values, Mapping) or any(isinstance(v, Mapping) for v in values.values()):
            raise config.refusal("rope_parameters", "one set per kind of layer", "one for all")
        found = values
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise config.refusal("rope scaling", kind, ", ".join(ROPE_KINDS))
    name = "partial_rotary_factor"
    share = found[name] if name in found else config.raw.get(name) or 1
    if share != 1:
        raise config.refusal(name, share, "1 (whole heads)")
    theta = found.get("rope_theta", config.raw.get("rope_theta", 10000.0))
    rope = Rope(theta=config.positive("rope_theta", theta))
    if kind == "default":
        return rope
    names = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    for name in names:
        if name not in found:
            raise config.refusal(f"rope scaling {kind!r}", f"no {name}", f"a {name} above 0")
    rope = replace(rope, kind=kind, **{name: config.positive(name, found[name]) for name in names})
    if kind == "linear":
        return rope
    # Outside of the scaling's own keys this one wins, unlike all others.
    name = "original_max_position_embeddings"
    positions = found.get(name, config.whole("max_position_embeddings"))
    positions = config.raw.get(name, positions)
    return replace(rope, original_max_positions=config.positive(name, positions))
