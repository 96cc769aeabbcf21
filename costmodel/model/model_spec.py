"""A model as the cost model sees it: shapes, from a preset's name or a Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from costmodel.families.hf_config import FAMILIES, HFConfig, read_hf_config
from profiles.errors import InputError
from profiles.files import read_json

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Deeper than any model; every layer is laid out one by one.
MAX_LAYERS = 10_000


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
        if self.num_layers > MAX_LAYERS:
            raise InputError(
                "model num_layers", got=self.num_layers, allowed=f"{MAX_LAYERS} or fewer"
            )
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
    try:
        path = path / "config.json" if path.is_dir() else path
        is_file = path.suffix == ".json" or path.is_file()
    except OSError as error:
        # No file can have this name.
        raise InputError("model", got=error.strerror, allowed="a name or a path") from None
    if is_file:
        return spec_from_config(read_json(path, "model config"), name=path.resolve().parent.name)
    preset = _presets().get(name_or_path.lower())
    if preset is None:
        raise InputError(
            "model",
            got=repr(name_or_path),
            allowed=f"a folder with a config.json, or one of {', '.join(preset_names())}",
        )
    return spec_from_config(preset, name=name_or_path.lower())


def spec_from_config(raw: Mapping[str, Any], *, name: str) -> ModelSpec:
    """Read the shapes out of a Hugging Face ``config.json`` of a supported family."""
    config = read_hf_config(raw, name=name)
    return _opt_spec(config) if config.family == "opt" else _llama_spec(config)


def named_dtype(raw: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config names, if it names one."""
    value = raw.get("dtype")
    value = raw.get("torch_dtype") if value is None else value
    return None if value is None else str(value)


def _opt_spec(config: HFConfig) -> ModelSpec:
    hidden = config.whole("hidden_size")
    heads = config.whole("num_attention_heads")
    before = config.flag("do_layer_norm_before")
    if not before or config.whole("word_embed_proj_dim", instead_of_null=hidden) != hidden:
        raise InputError(
            f"config of {config.name}",
            got="OPT with projected embeddings or norms after the block (as in opt-350m)",
            allowed="OPT with word_embed_proj_dim = hidden_size and norms before the block",
        )
    # There are none, but kinds of layers that need one are refused.
    config.window()
    return ModelSpec(
        name=config.name,
        family=config.family,
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=config.whole("ffn_dim"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=config.whole("vocab_size"),
        max_positions=config.whole("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        attention_bias=config.flag("enable_bias"),
        dtype=named_dtype(config.raw) or "float16",
    )


def _llama_spec(config: HFConfig) -> ModelSpec:
    hidden = config.whole("hidden_size")
    heads = config.whole("num_attention_heads")
    if config.family == "llama" and hidden % heads:
        raise config.refusal("hidden_size", hidden, f"a multiple of the {heads} heads")
    if config.family == "qwen2" and "head_dim" not in config.raw:
        head_dim = hidden // heads
    else:
        takes_null = config.family in ("llama", "mistral")
        head_dim = config.whole("head_dim", instead_of_null=hidden // heads if takes_null else None)
    kv_heads = config.whole(
        "num_key_value_heads", instead_of_null=heads if config.family != "mistral" else None
    )
    # Attention inside one window is plain attention; beyond it, it is refused.
    window = config.window()
    positions = config.whole("max_position_embeddings")
    # Qwen2 has biases on its query, key and value, and Mistral has none, whatever the config says.
    has_bias = config.family == "qwen2"
    if config.family in ("llama", "qwen3"):
        has_bias = config.flag("attention_bias")
    return ModelSpec(
        name=config.name,
        family=config.family,
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=config.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.whole("vocab_size"),
        max_positions=positions if window is None else min(positions, window),
        tied_embeddings=config.flag("tie_word_embeddings"),
        attention_bias=has_bias,
        dtype=named_dtype(config.raw) or "bfloat16",
    )


def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("costmodel.model").joinpath("presets.json").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = json.loads(text)
    return presets
