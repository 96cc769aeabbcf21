"""A checkpoint of a bench rewritten as a GGUF file for llama.cpp, one tensor at a time.

Its tools take the vocabulary's size alone where only ids are fed. Its server wants words, and gets
made-up ones.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]  # extra ``bench`` only
import numpy as np
import torch
from safetensors import safe_open

from costmodel.model.spec import ModelSpec

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SUFFIXES = (".weight", ".bias")
# llama.cpp holds the experts of a layer in one tensor, checkpoints have one tensor an expert.
EXPERT_NUMBER = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")


def write_gguf(checkpoint: Path, spec: ModelSpec, path: Path, *, has_words: bool = False) -> None:
    """Write the weights of ``checkpoint`` in the dtype of ``spec``; vectors in float32.

    Parameters
    ----------
    spec
        Of a family in ``ARCHITECTURES``.
    path
        Appears only when the file is whole.
    has_words
        Whether it gets a vocabulary of made-up words.
    """
    partial = path.with_suffix(".partial")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[spec.family]]
    names = gguf.get_tensor_name_map(architecture, spec.num_layers)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    _add_numbers(writer, spec)
    if has_words:
        _add_words(writer, spec.vocab_size)
    else:
        writer.add_tokenizer_model("none")
    with contextlib.ExitStack() as stack:
        shards = [
            stack.enter_context(safe_open(shard, framework="pt"))
            for shard in sorted(checkpoint.glob("*.safetensors"))
        ]
        holders = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118
        tensors = _tensors(holders, names)
        for target, sources in tensors.items():
            shape = holders[sources[0]].get_slice(sources[0]).get_shape()
            dtype = "float32" if _is_float32(sources[0], shape) else spec.dtype
            if len(sources) > 1:
                shape = [len(sources), *shape]
            element = np.dtype(np.float32 if dtype == "float32" else np.uint16)
            raw_type = gguf.GGMLQuantizationType[TYPES[dtype]]
            num_bytes = element.itemsize * math.prod(shape)
            writer.add_tensor_info(target, shape, element, num_bytes, raw_dtype=raw_type)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for sources in tensors.values():
            parts = [_converted(name, holders[name].get_tensor(name), spec) for name in sources]
            writer.write_tensor_data(np.stack(parts) if len(parts) > 1 else parts[0])
    writer.close()
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(path)


def _add_numbers(writer: Any, spec: ModelSpec) -> None:
    (layer,) = spec.layer_kinds
    attention, mlp, experts = layer.attention, layer.mlp, layer.experts
    assert attention.rotary is not None and attention.rotary.kind == "default"
    writer.add_name(spec.name)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    if mlp is not None:
        writer.add_feed_forward_length(mlp.size)
    if experts is not None:
        writer.add_feed_forward_length(experts.expert.size)
        writer.add_expert_feed_forward_length(experts.expert.size)
        writer.add_expert_count(experts.num_experts)
        writer.add_expert_used_count(experts.experts_per_token)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(attention.rotary.theta)
    writer.add_layer_norm_rms_eps(layer.norm.eps)
    writer.add_vocab_size(spec.vocab_size)


def _add_words(writer: Any, vocab_size: int) -> None:
    """Add what llama.cpp wants of a SentencePiece vocabulary: special tokens, bytes, and words."""
    kinds = gguf.TokenType
    fixed = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    fixed += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    words = [(f"w{number}", kinds.NORMAL) for number in range(len(fixed), vocab_size)]
    tokens = [*fixed, *words][:vocab_size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(number) for number in range(vocab_size)])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_add_bos_token(False)


def _tensors(stored: Mapping[str, Any], names: Any) -> dict[str, list[str]]:
    """Return what each tensor of the file is made of; of experts in the order of their numbers."""
    found: dict[str, dict[int, str]] = {}
    for name in stored:
        number = EXPERT_NUMBER.search(name)
        target = names.get_name(EXPERT_NUMBER.sub("", name), try_suffixes=SUFFIXES)
        assert target is not None, name
        found.setdefault(target, {})[int(number[1]) if number else 0] = name
    return {target: [parts[n] for n in sorted(parts)] for target, parts in found.items()}


def _is_float32(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp holds a tensor in float32: vectors, and matrices that choose experts."""
    return len(shape) == 1 or name.endswith(".gate.weight")


def _converted(name: str, tensor: torch.Tensor, spec: ModelSpec) -> np.ndarray[Any, Any]:
    if _is_float32(name, tensor.shape):
        tensor = tensor.float()
    if ARCHITECTURES[spec.family] == "LLAMA":
        (layer,) = spec.layer_kinds
        heads = {"q_proj": layer.attention.num_heads, "k_proj": layer.attention.num_kv_heads}
        for part, num_heads in heads.items():
            if part in name:
                tensor = _interleaved(tensor, num_heads)
    raw = tensor.contiguous()
    return (raw if raw.dtype == torch.float32 else raw.view(torch.uint16)).numpy()


def _interleaved(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Order a head's rows as llama.cpp rotates them: neighbours, where others rotate halves."""
    pairs = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
