"""A model as the cost model sees it: shapes, from a preset's name or a Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from profiles.errors import InputError
from profiles.files import read_json

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes of a decoder-only transformer.

    Parameters
    ----------
    name
        Preset name, or the folder that the config came from.
    family
        One of ``FAMILIES``; decides norms, biases and whether the MLP is gated.
    num_kv_heads
        Heads of keys and values; fewer than ``num_heads`` is grouped-query attention.
    max_positions
        Longest context, prompt and generated tokens together.
    tied_embeddings
        Whether the output head is the token embedding table.
    attention_bias
        Whether the query, key and value projections have biases.
    dtype
        The dtype that the model computes in.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError("model family", got=repr(self.family), allowed=", ".join(FAMILIES))
        if self.dtype not in DTYPE_BYTES:
            raise InputError("model dtype", got=repr(self.dtype), allowed=", ".join(DTYPE_BYTES))
        for name in (
            "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim",
            "vocab_size", "max_positions",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"model {name}", got=getattr(self, name), allowed="1 or more")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                "model num_kv_heads",
                got=self.num_kv_heads,
                allowed=f"a divisor of num_heads {self.num_heads}",
            )

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two projections (SwiGLU) before the last one."""
        return self.family != "opt"

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads are as wide)."""
        return self.num_kv_heads * self.head_dim

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def full_bits(self) -> int:
        """Bits of one element in the compute dtype."""
        return 8 * self.dtype_bytes

    def with_dtype(self, dtype: str) -> ModelSpec:
        """Return the same model computing in another dtype."""
        return replace(self, dtype=dtype)


def preset_names() -> list[str]:
    """Names that ``load_model_spec`` knows without a file."""
    return sorted(_presets())


def load_model_spec(name_or_path: str) -> ModelSpec:
    """Find a model: a preset's name, a folder with a ``config.json``, or that file itself."""
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return spec_from_config(read_json(path, "model config"), name=path.resolve().parent.name)
    preset = _presets().get(name_or_path.lower())
    if preset is None:
        raise InputError(
            "model",
            got=repr(name_or_path),
            allowed=f"a folder with a config.json, or one of {', '.join(preset_names())}",
        )
    return spec_from_config(preset, name=name_or_path.lower())


def spec_from_config(config: Mapping[str, Any], *, name: str) -> ModelSpec:
    """Read the shapes out of a Hugging Face ``config.json`` of a supported family."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"model_type of {name}", got=repr(family), allowed=", ".join(FAMILIES))
    return _opt_spec(config, name) if family == "opt" else _llama_spec(config, name, str(family))


def _opt_spec(config: Mapping[str, Any], name: str) -> ModelSpec:
    hidden = _int(config, "hidden_size", name)
    heads = _int(config, "num_attention_heads", name)
    if (
        not config.get("do_layer_norm_before", True)
        or config.get("word_embed_proj_dim", hidden) != hidden
    ):
        raise InputError(
            f"config of {name}",
            got="OPT with projected embeddings or norms after the block (as in opt-350m)",
            allowed="OPT with word_embed_proj_dim = hidden_size and norms before the block",
        )
    return ModelSpec(
        name=name,
        family="opt",
        num_layers=_int(config, "num_hidden_layers", name),
        hidden_size=hidden,
        ffn_size=_int(config, "ffn_dim", name),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=_int(config, "vocab_size", name),
        max_positions=_int(config, "max_position_embeddings", name),
        tied_embeddings=_bool(config, "tie_word_embeddings", name, default=True),
        attention_bias=_bool(config, "enable_bias", name, default=True),
        dtype=_dtype(config, "float16"),
    )


def _llama_spec(config: Mapping[str, Any], name: str, family: str) -> ModelSpec:
    hidden = _int(config, "hidden_size", name)
    heads = _int(config, "num_attention_heads", name)
    positions = _int(config, "max_position_embeddings", name)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        # Attention inside one window is plain attention; beyond it, it is refused.
        positions = min(positions, _int(config, "sliding_window", name))
    return ModelSpec(
        name=name,
        family=family,
        num_layers=_int(config, "num_hidden_layers", name),
        hidden_size=hidden,
        ffn_size=_int(config, "intermediate_size", name),
        num_heads=heads,
        num_kv_heads=_int(config, "num_key_value_heads", name, default=heads),
        head_dim=_int(config, "head_dim", name, default=hidden // heads),
        vocab_size=_int(config, "vocab_size", name),
        max_positions=positions,
        tied_embeddings=_bool(config, "tie_word_embeddings", name, default=False),
        attention_bias=_bool(config, "attention_bias", name, default=family == "qwen2"),
        dtype=_dtype(config, "bfloat16"),
    )


def _int(config: Mapping[str, Any], key: str, name: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"{key} in config of {name}", got=repr(value), allowed="a whole number above 0"
        )
    return value


def _bool(config: Mapping[str, Any], key: str, name: str, *, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{key} in config of {name}", got=repr(value), allowed="true or false")
    return value


def _dtype(config: Mapping[str, Any], default: str) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or default)


def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("costmodel").joinpath("presets.json").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = json.loads(text)
    return presets
