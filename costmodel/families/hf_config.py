"""A Hugging Face ``config.json``, read the way transformers 5 reads it.

An absent key has the default of the family's config class there. Null is refused unless it means
something there. Keys that a family does not read are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from profiles.errors import InputError

# The largest whole number that is taken: no dimension of a model is larger.
MAX_WHOLE = 2**31 - 1

_LLAMA = {
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
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# What each family's class in transformers takes for keys that are absent. A test holds every
# entry against that class.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
}
FAMILIES = tuple(DEFAULTS)
# Older names of kinds of attention.
_LAYER_TYPES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HFConfig:
    """The keys of one ``config.json``.

    Parameters
    ----------
    family
        One of ``FAMILIES``.
    name
        What the model is called in messages.
    raw
        The parsed file.
    """

    family: str
    name: str
    raw: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return what the file says, or the family's default."""
        return self.raw.get(key, DEFAULTS[self.family].get(key))

    def whole(self, key: str, *, instead_of_null: int | None = None, least: int = 1) -> int:
        """Return a whole number."""
        value = self.get(key)
        if value is None and instead_of_null is not None:
            return instead_of_null
        if type(value) is not int or not least <= value <= MAX_WHOLE:
            raise self.refusal(key, value, f"a whole number of at least {least}")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def number(self, key: str) -> float:
        """Return a number above zero that is written as a fraction."""
        value = self.positive(key, self.get(key))
        if not isinstance(self.get(key), float):
            raise self.refusal(key, self.get(key), "a number with a decimal point or an exponent")
        return value

    def positive(self, key: str, value: Any) -> float:
        """Return ``value``, which was found under ``key``, if it is a number above zero."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise self.refusal(key, value, "a number above 0")
        return float(value)

    def window(self) -> int | None:
        """Return how many tokens the attention of some layer is limited to, if any is."""
        kinds, window = self._layer_types(), None
        if self.family not in ("opt", "llama") and self.get("sliding_window") is not None:
            window = self.whole("sliding_window")
        if self.family.startswith("qwen"):
            if not self.flag("use_sliding_window"):
                window = None
            first = self.whole("max_window_layers", least=0)
            kinds = kinds or ["sliding_attention"] * (first < self.whole("num_hidden_layers"))
            slides = window is not None and "sliding_attention" in kinds
        else:
            # With kinds of layers, transformers takes Mistral for a model that needs a window.
            slides = window is not None and (not kinds or "sliding_attention" in kinds)
            if self.family == "mistral" and "layer_types" in self.raw and window is None:
                raise self.refusal("sliding_window", None, "a number beside layer_types")
        if self.raw.get("layer_types") and "sliding_attention" in kinds and window is None:
            raise self.refusal("layer_types", "sliding_attention", "full_attention without windows")
        return window if slides else None

    def refusal(self, key: str, got: object, allowed: str, hint: str = "") -> InputError:
        """Make the error for a key whose value this project does not follow."""
        text = "null" if got is None else got if isinstance(got, str) and " " in got else repr(got)
        return InputError(f"{key} in config of {self.name}", got=text, allowed=allowed, hint=hint)

    def _layer_types(self) -> list[str]:
        found = self.raw.get("layer_types")
        if found is None:
            return []
        count = self.whole("num_hidden_layers")
        if not isinstance(found, list) or len(found) != count:
            raise self.refusal("layer_types", found, f"a list of {count}, one for each layer")
        for kind in found:
            if not isinstance(kind, str) or kind not in _LAYER_TYPES:
                raise self.refusal("layer_types", kind, ", ".join(_LAYER_TYPES))
        return [_LAYER_TYPES[kind] for kind in found]


def read_hf_config(raw: Mapping[str, Any], *, name: str) -> HFConfig:
    """Take up a parsed ``config.json``; refuses a family that is not supported."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"model_type of {name}", got=repr(family), allowed=", ".join(FAMILIES))
    return HFConfig(family=family, name=name, raw=raw)
