"""Models whose matrices are encoded, in mixtures as files have them."""

from __future__ import annotations

import functools

from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.shapes import Shapes, component_shapes, embedding_shapes, head_shapes
from costmodel.model.spec import ModelSpec

# Elements of a superblock of GGUF, and of a block; rows of other widths are in another encoding.
SUPERBLOCK, BLOCK = 256, 32


@functools.cache
def as_q4_k_m(spec: ModelSpec) -> ModelSpec:
    """Encode a model about as llama.cpp's Q4_K_M: all in Q4_K, but the head, and of every other
    layer the values and the down matrices, in Q6_K. Rows that no superblocks fill are in Q4_0 and
    Q8_0, rows that no blocks fill are plain."""

    def rows_of(number: int, name: str) -> list[EncodedRows]:
        rows, width = _shapes_of(spec, number)[name]
        more = number < 0 and name == "head.weight"
        more |= number % 2 == 1 and name.endswith("down.weight")
        if name.startswith(("router", "shared_gate")) or width % BLOCK:
            return []
        if name == "qkv.weight" and number % 2 == 1:
            attention = spec.layer(number).attention
            if attention.latent is None:
                values = attention.kv_size
                first = EncodedRows(
                    tensor=name, rows=rows - values, encoding=_encoding(width, more=False)
                )
                last = EncodedRows(tensor=name, rows=values, encoding=_encoding(width, more=True))
                return [first, last]
        return [EncodedRows(tensor=name, rows=rows, encoding=_encoding(width, more=more))]

    return with_encodings(spec, rows_of)


def encoded_alike(spec: ModelSpec, encoding: str, *names: str) -> ModelSpec:
    """Encode the matrices with these names only, in all layers."""

    def rows_of(number: int, name: str) -> list[EncodedRows]:
        rows, _ = _shapes_of(spec, number)[name]
        return [EncodedRows(tensor=name, rows=rows, encoding=encoding)] if name in names else []

    return with_encodings(spec, rows_of)


def _encoding(width: int, *, more: bool) -> str:
    if width % SUPERBLOCK == 0:
        return "Q6_K" if more else "Q4_K"
    return "Q8_0" if more else "Q4_0"


def _shapes_of(spec: ModelSpec, number: int) -> dict[str, tuple[int, int]]:
    """Return the rows and the width of each matrix of a layer; -1 is outside of layers."""
    found: Shapes = {}
    if number < 0:
        found = embedding_shapes(spec) | head_shapes(spec, spec.vocab_size, is_first=True)
    else:
        for shapes, _ in component_shapes(spec, spec.layer(number)).values():
            found |= shapes
    return {name: (shape[0], shape[1]) for name, shape in found.items() if len(shape) == 2}
