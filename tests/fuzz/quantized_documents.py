"""Quantized checkpoints as documents: their config, the header of their file, changed bytes."""

from __future__ import annotations

import contextlib
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

NO_DOCUMENT = ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError
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
    """Return sound documents of each layout: of all parts of a checkpoint, and of some of them.

    A changed header or config is mostly refused at once; other files are read to their end.
    """
    documents: list[dict[str, Any]] = []
    for name in LAYOUTS:
        config, header, body = _parts(name)
        values = {
            "layout": name,
            # Places in the file's tensors, and bytes there.
            "bytes": [[place, body[place]] for place in (0, 100, len(body) // 2, len(body) - 1)],
            # The descriptions of matrices of bitsandbytes, which are JSON inside of tensors.
            "states": _states(header, body),
        }
        config = {"quantization_config": config["quantization_config"]}
        documents += [values, values | config, values | config | {"header": header}]
    return tuple(documents)


def read_quantized_document(data: bytes, folder: Path) -> None:
    """Write the checkpoint of a document, and read all of it."""
    try:
        document = json.loads(data)
        config, header, body = _parts(document["layout"])
        config = config | {key: document[key] for key in document if key in config}
        header = as_bytes(document.get("header", header))
    except NO_DOCUMENT:
        # Not what a checkpoint can be.
        return
    (folder / "config.json").write_bytes(as_bytes(config))
    path = folder / SINGLE_NAME
    path.write_bytes(len(header).to_bytes(8, "little") + header + _changed(document, body))
    # What a search reads first.
    load_model_spec(str(folder))
    source = Checkpoint.open(folder)
    for index, layer in enumerate(model_layers(source.spec)):
        for layout in layer.components:
            out = torch.empty(layout.num_bytes, dtype=torch.uint8)
            source.read_range(index, layout, 0, out)


def _changed(document: dict[str, Any], body: bytes) -> bytes:
    """Return the tensors with a document's changes, up to the first one that is none."""
    changed = bytearray(body)
    with contextlib.suppress(*NO_DOCUMENT):
        for place, size, state in document.get("states", ()):
            if 0 <= place <= place + size <= len(changed):
                changed[place : place + size] = as_bytes(state)[:size].ljust(size)
    with contextlib.suppress(*NO_DOCUMENT):
        for place, value in document.get("bytes", ()):
            changed[place % len(changed)] = value % 256
    return bytes(changed)


def _states(header: Any, body: bytes) -> list[Any]:
    """Return place, size and text of the first descriptions in a file."""
    found = [header[name]["data_offsets"] for name in sorted(header) if ".quant_state." in name]
    return [[start, end - start, json.loads(body[start:end])] for start, end in found[:2]]


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
