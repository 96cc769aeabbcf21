"""Quantized checkpoints as documents: their config, the header of their file, changed bytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from costmodel.model.layout import model_layers
from costmodel.model.loading import load_model_spec
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.stored_tensors import SINGLE_NAME
from tests.executor.quantized_files import (
    Awq,
    Bnb4,
    Bnb8,
    Fp8,
    Gptq,
    Int8,
    Mxfp4,
    Packed4,
    save_quantized,
)
from tests.fuzz.mutations import as_bytes

LAYOUTS: Mapping[str, tuple[str, Any]] = {
    "gptq": ("llama", Gptq(order="scattered")),
    "awq": ("llama", Awq()),
    "packed": ("llama", Packed4(is_symmetric=False, order="scattered")),
    "fp8": ("mixtral", Fp8()),
    "fp8-tensor": ("llama", Fp8(strategy="tensor")),
    "int8": ("llama", Int8()),
    "bnb4": ("llama", Bnb4()),
    "bnb8": ("llama", Bnb8()),
    "mxfp4": ("gpt_oss", Mxfp4()),
}


@cache
def quantized_documents() -> tuple[Any, ...]:
    """Return a sound document of each layout."""
    return tuple(
        {
            "layout": name,
            "quantization_config": config["quantization_config"],
            "header": header,
            # Places in the file's tensors, and bytes there.
            "bytes": [[0, _body(name)[0]], [100, _body(name)[100]]],
            # The descriptions of matrices of bitsandbytes, which are JSON inside of tensors.
            "states": _states(header, _body(name)),
        }
        for name, (config, header, _) in ((name, _parts(name)) for name in LAYOUTS)
    )


def read_quantized_document(data: bytes, folder: Path) -> None:
    """Write the checkpoint of a document, and read all of it."""
    try:
        document = json.loads(data)
        config, _, body = _parts(document["layout"])
        changed = bytearray(body)
        for place, value in document["bytes"]:
            changed[place % len(changed)] = value % 256
        for place, size, state in document.get("states", ()):
            if 0 <= place <= place + size <= len(changed):
                changed[place : place + size] = as_bytes(state)[:size].ljust(size)
        config = config | {"quantization_config": document["quantization_config"]}
        header = as_bytes(document["header"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        # Not what a checkpoint can be.
        return
    (folder / "config.json").write_bytes(as_bytes(config))
    path = folder / SINGLE_NAME
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(changed))
    # What a search reads first.
    load_model_spec(str(folder))
    source = Checkpoint.open(folder)
    for index, layer in enumerate(model_layers(source.spec)):
        for layout in layer.components:
            out = torch.empty(layout.num_bytes, dtype=torch.uint8)
            source.read_range(index, layout, 0, out)


def _states(header: Any, body: bytes) -> list[Any]:
    """Return place, size and text of the first descriptions in a file."""
    found = [header[name]["data_offsets"] for name in sorted(header) if ".quant_state." in name]
    return [[start, end - start, json.loads(body[start:end])] for start, end in found[:2]]


def _body(layout: str) -> bytes:
    return _parts(layout)[2]


@cache
def _parts(layout: str) -> tuple[dict[str, Any], Any, bytes]:
    """Return the config, the header and the tensors of a small checkpoint."""
    family, draw = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_quantized(folder, family, draw, num_layers=1, intermediate_size=64, vocab_size=24)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        data = (folder / SINGLE_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return config, json.loads(data[8 : 8 + length]), data[8 + length :]
