"""A checkpoint of a bench rewritten as a GGUF file for llama.cpp, one tensor at a time.

There is no tokenizer: llama.cpp takes the vocabulary's size alone where only ids are fed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]  # extra ``bench`` only
import numpy as np
import torch
from safetensors import safe_open

from costmodel.model.spec import ModelSpec

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SUFFIXES = (".weight", ".bias")


def write_gguf(checkpoint: Path, spec: ModelSpec, path: Path) -> None:
    """Write the weights of ``checkpoint`` in the dtype of ``spec``; vectors in float32.

    Parameters
    ----------
    spec
        Of a family in ``ARCHITECTURES``.
    path
        Appears only when the file is whole.
    """
    partial = path.with_suffix(".partial")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[spec.family]]
    names = gguf.get_tensor_name_map(architecture, spec.num_layers)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    _add_numbers(writer, spec)
    with contextlib.ExitStack() as stack:
        shards = [
            stack.enter_context(safe_open(shard, framework="pt"))
            for shard in sorted(checkpoint.glob("*.safetensors"))
        ]
        for name, shape in _shapes(shards):
            target = names.get_name(name, try_suffixes=SUFFIXES)
            assert target is not None, name
            dtype = "float32" if len(shape) == 1 else spec.dtype
            element = np.dtype(np.float32 if dtype == "float32" else np.uint16)
            raw_type = gguf.GGMLQuantizationType[TYPES[dtype]]
            num_bytes = element.itemsize * int(np.prod(shape))
            writer.add_tensor_info(target, shape, element, num_bytes, raw_dtype=raw_type)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for shard in shards:
            for name in shard.keys():  # noqa: SIM118  # not a mapping
                writer.write_tensor_data(_converted(name, shard.get_tensor(name), spec))
    writer.close()
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(path)


def _add_numbers(writer: Any, spec: ModelSpec) -> None:
    (layer,) = spec.layer_kinds
    attention, mlp = layer.attention, layer.mlp
    assert mlp is not None and attention.rotary is not None
    assert attention.rotary.kind == "default"
    writer.add_name(spec.name)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(mlp.size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(attention.rotary.theta)
    writer.add_layer_norm_rms_eps(layer.norm.eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("none")


def _shapes(shards: list[Any]) -> Iterator[tuple[str, list[int]]]:
    for shard in shards:
        for name in shard.keys():  # noqa: SIM118  # not a mapping
            yield name, shard.get_slice(name).get_shape()


def _converted(name: str, tensor: torch.Tensor, spec: ModelSpec) -> np.ndarray[Any, Any]:
    if tensor.dim() == 1:
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
