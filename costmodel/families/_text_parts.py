"""Decoders of text inside of models for images: where their keys and tensors are.

A model for images nests the config of its decoder as ``text_config``. Its positions have three
dimensions (multi-section rotary); those of text alone are equal, so the rotation is the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from costmodel.families._shared import FOLLOWED
from costmodel.model.family import GENERIC_TOKENIZER
from costmodel.model.spec import HeadSpec
from profiles.errors import InputError

# Keys of the outer config that hold for the decoder; the dtype is always the outer one.
_DTYPE_KEYS = ("dtype", "torch_dtype")
_OUTER_KEYS = (
    *(key for key in FOLLOWED if key != "text_config"),
    "quantization_config",
    "tie_word_embeddings",
)
_ROTARY_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """The decoder of text of a model for images.

    Parameters
    ----------
    kind
        The ``model_type`` of the decoder where its config names none.
    is_flat
        Whether the decoder's keys may stand in the outer config, without ``text_config``.
    ties_inside
        Whether a tie in the decoder's own config counts, whatever the outer one says.
    tokenizer_class, fixes_tokenizer_class
        As in ``Family``.
    """

    kind: str
    is_flat: bool = False
    ties_inside: bool = False
    tokenizer_class: str = GENERIC_TOKENIZER
    fixes_tokenizer_class: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextKind:
    """A decoder that transformers has in a model for images only.

    Parameters
    ----------
    family
        The family that it computes as.
    defaults
        The keys that it reads, and their values where they are absent. Other keys are dropped,
        because the family would read more of them.
    optional
        Keys that it reads only where they are there.
    """

    family: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


# By the outer ``model_type``.
TEXT_PARTS: Mapping[str, TextPart] = {
    "gemma3": TextPart(kind="gemma3_text", tokenizer_class="GemmaTokenizer"),
    "glm4v": TextPart(ties_inside=True, kind="glm4v_text", fixes_tokenizer_class=True),
    "glm4v_moe": TextPart(ties_inside=True, kind="glm4v_moe_text", fixes_tokenizer_class=True),
    "idefics3": TextPart(kind="llama"),
    "internvl": TextPart(kind="qwen2", tokenizer_class="Qwen2Tokenizer"),
    "llama4": TextPart(kind="llama4_text"),
    "llava": TextPart(ties_inside=True, kind="llama", fixes_tokenizer_class=True),
    "llava_next": TextPart(kind="llama", fixes_tokenizer_class=True),
    "llava_onevision": TextPart(ties_inside=True, kind="qwen2"),
    "mistral3": TextPart(kind="mistral", fixes_tokenizer_class=True),
    "qwen2_vl": TextPart(
        ties_inside=True, kind="qwen2_vl_text", is_flat=True, tokenizer_class="Qwen2Tokenizer"
    ),
    "qwen2_5_vl": TextPart(
        ties_inside=True, kind="qwen2_5_vl_text", is_flat=True, tokenizer_class="Qwen2Tokenizer"
    ),
    "qwen3_vl": TextPart(kind="qwen3_vl_text", tokenizer_class="Qwen2Tokenizer"),
    "smolvlm": TextPart(kind="llama", fixes_tokenizer_class=True),
}
_QWEN2_VL = TextKind(
    family="qwen2",
    defaults={
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 80,
        "layer_types": None,
        "rope_theta": 1e6,
    },
)
TEXT_KINDS: Mapping[str, TextKind] = {
    "glm4v_text": TextKind(
        family="glm4",
        defaults={
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
        },
    ),
    "glm4v_moe_text": TextKind(
        family="glm4_moe",
        defaults={
            "vocab_size": 151424,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "partial_rotary_factor": 0.5,
        },
        optional=("head_dim", "num_local_experts"),
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": TextKind(
        family="qwen3",
        defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "rope_theta": 5e5,
        },
    ),
}


def text_config(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the config of the decoder of text, which is ``raw`` itself where that is its own.

    Raises
    ------
    InputError
        Where a model for images has no config of its decoder.
    """
    part = TEXT_PARTS.get(str(raw.get("model_type")))
    if part is None:
        return raw
    inner = raw.get("text_config")
    if inner is None and part.is_flat:
        inner = {key: value for key, value in raw.items() if key != "model_type"}
    if not isinstance(inner, Mapping):
        got = "null" if inner is None else repr(inner)
        raise InputError(f"text_config in config of {name}", got=got, allowed="an object")
    kind = inner.get("model_type", part.kind)
    kept = {key: value for key, value in inner.items() if key not in _DTYPE_KEYS}
    outer = {key: raw[key] for key in (*_OUTER_KEYS, *_DTYPE_KEYS) if key in raw}
    made = {**kept, **outer, "model_type": kind}
    if part.ties_inside and inner.get("tie_word_embeddings") is True:
        made["tie_word_embeddings"] = True
    return _as_family(made)


def check_head(head: HeadSpec, name: str) -> None:
    """Refuse a head with more than its matrix: models for images compute only that."""
    if head.scale != 1 or head.soft_cap is not None:
        raise InputError(
            f"head of {name}",
            got="logits with a factor or a soft cap",
            allowed="neither, because models for images drop them",
        )


def _as_family(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as one of its family, where only models for images have its class."""
    kind = TEXT_KINDS.get(str(config["model_type"]))
    if kind is None:
        return config
    read = {*kind.defaults, *kind.optional, *_OUTER_KEYS, *_DTYPE_KEYS, *_ROTARY_KEYS}
    found = {key: value for key, value in config.items() if key in read}
    made = {**kind.defaults, **found, "model_type": kind.family}
    size, heads = made["hidden_size"], made["num_attention_heads"]
    if "head_dim" not in made and isinstance(size, int) and isinstance(heads, int) and heads > 0:
        made["head_dim"] = size // heads
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(made.get(key), Mapping):
            made[key] = _plain_rotary(made[key])
    return made


def _plain_rotary(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary keys with the kind ``mrope``, of older configs, as the plain one."""
    return {
        key: "default" if key in ("type", "rope_type") and value == "mrope" else value
        for key, value in keys.items()
    }
