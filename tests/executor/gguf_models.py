"""Tiny models in GGUF, written by the package ``gguf`` from what transformers has saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from costmodel.gguf.model import GgufModel
from costmodel.gguf.names import stored_rows
from costmodel.model.layout import ComponentLayout, model_layers
from costmodel.model.spec import ModelSpec

SUFFIXES = (".weight", ".bias")
EXPERT = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")
# What converters do to the tensors of an architecture.
PERMUTED, PLUS_ONE = ("llama", "smollm3", "granite"), ("gemma", "gemma2", "gemma3")


def write_tiny_gguf(
    folder: Path,
    arch: str,
    numbers: Mapping[str, Any],
    vectors: Mapping[str, list[float]] | None = None,
) -> Path:
    """Write the checkpoint in ``folder`` as a GGUF file in float32.

    Parameters
    ----------
    numbers
        Keys of the architecture besides the usual ones, without the prefix.
    vectors
        More tensors.
    """
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    architecture = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    path = folder / f"{arch}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    for key, value in numbers.items():
        _add(writer, f"{arch}.{key}", value)
    for name, tensor in _tensors(folder, arch, names, config).items():
        writer.add_tensor(name, tensor)
    for name, vector in (vectors or {}).items():
        writer.add_tensor(name, np.array(vector, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    adder = "add_array" if isinstance(value, list) else adders[type(value)]
    getattr(writer, adder)(key, value)


def _tensors(
    folder: Path, arch: str, names: Any, config: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors as a converter stores them; those of experts are stacked."""
    parts: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        number = EXPERT.search(name)
        target = names.get_name(EXPERT.sub("", name), try_suffixes=SUFFIXES)
        assert target is not None, name
        values = tensor.float()
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if arch in PERMUTED and f".{part}_proj." in name:
                pairs = values.view(config[heads], 2, -1, *values.shape[1:])
                values = pairs.transpose(1, 2).reshape(values.shape)
        if arch in PLUS_ONE and name.endswith("norm.weight"):
            values = values + 1
        parts.setdefault(target, {})[int(number[1]) if number else -1] = values.numpy()
    return {
        target: found[-1] if -1 in found else np.stack([found[n] for n in sorted(found)])
        for target, found in parts.items()
    }


class GgufSource:
    """The weights of a file in float32; see ``WeightSource``."""

    fingerprint = ""

    def __init__(self, model: GgufModel, spec: ModelSpec) -> None:
        self.spec = spec.with_dtype("float32")
        self._model = model
        self._layers = list(_decoder_layers(self.spec))

    def check_unchanged(self) -> None:
        """Do nothing."""

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Fill ``out`` with all of a component."""
        assert start == 0 and len(out) == layout.num_bytes
        out.zero_()
        for unit in range(layout.num_units):
            for tensor in layout.tensors:
                values = self._read(tensor.name, self._layers[index], unit)
                if tensor.name == "head.weight":
                    values = values.view(-1, tensor.shape[1])[layout.first_row :][: tensor.shape[0]]
                first = unit * layout.unit_bytes + tensor.offset_bytes
                target = out[first : first + tensor.num_bytes].view(torch.float32)
                target.copy_(values.flatten())

    def _read(self, name: str, layer: int, expert: int) -> torch.Tensor:
        parts = []
        for rows in stored_rows(self._model, self.spec, name, layer=layer, expert=expert):
            entry = rows.entry
            with entry.path.open("rb") as file:
                file.seek(entry.offset_bytes)
                values = np.frombuffer(file.read(entry.num_bytes), dtype="<f4")
            table = torch.tensor(values).view(-1, entry.shape[-1])
            parts.append(table[rows.first : rows.first + rows.count].flatten())
        return torch.cat(parts)


def _decoder_layers(spec: ModelSpec) -> Iterator[int]:
    """Yield the decoder layer of each layer of the schedule, or 0."""
    layer = -1
    for layout in model_layers(spec):
        layer += layout.kind in ("decoder", "attention")
        yield max(layer, 0) if layout.kind in ("decoder", "attention", "experts") else 0
