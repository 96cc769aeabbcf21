"""The description of a model in GGUF with the encodings of its file."""

from __future__ import annotations

from pathlib import Path

from costmodel.gguf.config import spec_from_gguf
from costmodel.gguf.model import GgufModel
from costmodel.gguf.names import stored_rows
from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.spec import ModelSpec
from profiles.encodings import BLOCK_ENCODINGS


def load_gguf_spec(path: Path) -> ModelSpec:
    """Load a model's description from the headers of its file and of all other parts.

    Raises
    ------
    InputError
        As ``GgufModel.open`` and ``spec_from_gguf`` do.
    """
    return encoded_spec(GgufModel.open(path), path.name)


def encoded_spec(model: GgufModel, name: str) -> ModelSpec:
    """Return a model's description with the encodings that its file has; floats have the model's
    dtype. Errors are those of ``spec_from_gguf``."""
    spec = spec_from_gguf(model, name)

    def rows_of(layer: int, tensor: str) -> list[EncodedRows]:
        return [
            EncodedRows(tensor=tensor, rows=part.count, encoding=_kept(part.entry.dtype))
            for part in stored_rows(model, spec, tensor, layer=max(layer, 0))
        ]

    return with_encodings(spec, rows_of)


def _kept(encoding: str) -> str:
    return "" if BLOCK_ENCODINGS[encoding].is_plain else encoding
