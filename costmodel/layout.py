"""Where each tensor of a model lies inside its layer's run of bytes. No torch.

A model is a list of layers in the order of the schedule: the embedding, the decoder layers, and
the output head cut into chunks of about a decoder layer's size. The weights of one layer are one
contiguous run of bytes, so that the layer moves as one copy and one read. A placement cuts that
run between two rows of a matrix; vectors are never cut.

Matrices that multiply the same input are stacked into one (``qkv``, ``gate_up``), because one
large product is faster than several small ones.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass

from costmodel.model_spec import ModelSpec

# Tensors start on a cache line, layers of the weight file on a disk page.
TENSOR_ALIGNMENT = 64

# Quantized elements share a scale and a zero, 16 bits each, in groups of this many along a row.
GROUP_SIZE = 64
GROUP_BYTES = 4

# OPT numbers its positions from 2 (the first two rows of its table are never used).
OPT_POSITION_OFFSET = 2


def round_up(value: int, multiple: int) -> int:
    """Round ``value`` up to a whole number of ``multiple``."""
    return -(-value // multiple) * multiple


def packed_bytes(num_elements: int, bits: int) -> int:
    """Bytes of one row of elements at ``bits`` each; below 16 bits, with its groups' scales."""
    if bits >= 16:
        return num_elements * bits // 8
    return -(-num_elements * bits // 8) + -(-num_elements // GROUP_SIZE) * GROUP_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """One tensor in its layer: rows of ``row_bytes`` from ``offset_bytes`` on."""

    name: str
    shape: tuple[int, ...]
    offset_bytes: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows that a cut may fall between; a vector counts as one."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def end_bytes(self) -> int:
        """Offset just behind the tensor."""
        return self.offset_bytes + self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """The tensors of one layer and the bytes that they take, padding included.

    ``kind`` is ``embed`` (rows are gathered, never staged), ``decoder`` or ``head``.
    ``first_row`` is the vocabulary row at which a chunk of the head begins.
    """

    kind: str
    tensors: tuple[TensorLayout, ...]
    num_bytes: int
    first_row: int = 0

    @property
    def num_matrix_elements(self) -> int:
        """Elements of the matrices: a token costs two FLOP for each."""
        return sum(t.num_elements for t in self.tensors if len(t.shape) == 2)

    def cut_near(self, num_bytes: float) -> int:
        """Find the row boundary nearest to ``num_bytes`` from the start of the layer."""
        if num_bytes <= 0 or not self.tensors:
            return 0
        if num_bytes >= self.num_bytes:
            return self.num_bytes
        starts = [t.offset_bytes for t in self.tensors]
        tensor = self.tensors[bisect.bisect_right(starts, num_bytes) - 1]
        row = min(round((num_bytes - tensor.offset_bytes) / tensor.row_bytes), tensor.num_rows)
        if row == tensor.num_rows:
            behind = bisect.bisect_right(starts, tensor.offset_bytes)
            return starts[behind] if behind < len(starts) else self.num_bytes
        return tensor.offset_bytes + row * tensor.row_bytes


@functools.lru_cache(maxsize=64)
def model_layers(spec: ModelSpec, weight_bits: int | None = None) -> tuple[LayerLayout, ...]:
    """Lay out every layer of ``spec`` in the order in which the schedule visits them.

    ``weight_bits`` is what an element of a matrix takes, scales apart; ``None`` is the model's
    own dtype. Vectors keep that dtype.
    """
    bits = weight_bits or spec.full_bits
    decoder = _pack("decoder", _decoder_shapes(spec), spec, bits)
    return (
        _pack("embed", _embed_shapes(spec), spec, bits),
        *(decoder for _ in range(spec.num_layers)),
        *_head_chunks(spec, decoder.num_bytes, bits),
    )


def _norm_shapes(spec: ModelSpec, name: str) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (spec.hidden_size,)}
    return weight if spec.is_gated else weight | {f"{name}.bias": (spec.hidden_size,)}


def _decoder_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, ffn, query = spec.hidden_size, spec.ffn_size, spec.query_size
    qkv = query + 2 * spec.kv_size
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= _norm_shapes(spec, "attention_norm") | _norm_shapes(spec, "mlp_norm")
    if spec.attention_bias:
        shapes["qkv.bias"] = (qkv,)
    if spec.family == "qwen3":
        shapes |= {"q_norm.weight": (spec.head_dim,), "k_norm.weight": (spec.head_dim,)}
    if not spec.is_gated and spec.attention_bias:
        shapes |= {"output.bias": (hidden,), "up.bias": (ffn,), "down.bias": (hidden,)}
    shapes |= {"qkv.weight": (qkv, hidden), "output.weight": (hidden, query)}
    if spec.is_gated:
        return shapes | {"gate_up.weight": (2 * ffn, hidden), "down.weight": (hidden, ffn)}
    return shapes | {"up.weight": (ffn, hidden), "down.weight": (hidden, ffn)}


def _embed_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if not spec.is_gated:
        shapes["positions.weight"] = (spec.max_positions + OPT_POSITION_OFFSET, spec.hidden_size)
    if not spec.tied_embeddings:
        shapes["tokens.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _head_chunks(spec: ModelSpec, chunk_bytes: int, bits: int) -> list[LayerLayout]:
    row_bytes = packed_bytes(spec.hidden_size, bits)
    num_chunks = max(1, round(spec.vocab_size * row_bytes / chunk_bytes))
    rows_per_chunk = -(-spec.vocab_size // num_chunks)
    chunks = []
    for first in range(0, spec.vocab_size, rows_per_chunk):
        rows = min(rows_per_chunk, spec.vocab_size - first)
        shapes = _norm_shapes(spec, "final_norm") if first == 0 else {}
        shapes = shapes | {"head.weight": (rows, spec.hidden_size)}
        chunks.append(_pack("head", shapes, spec, bits, first_row=first))
    return chunks


def _pack(
    kind: str, shapes: dict[str, tuple[int, ...]], spec: ModelSpec, bits: int, first_row: int = 0
) -> LayerLayout:
    offset = 0
    tensors = []
    for name, shape in shapes.items():
        row_bytes = packed_bytes(shape[-1], bits if len(shape) == 2 else spec.full_bits)
        tensor = TensorLayout(name=name, shape=shape, offset_bytes=offset, row_bytes=row_bytes)
        tensors.append(tensor)
        offset = round_up(tensor.end_bytes, TENSOR_ALIGNMENT)
    return LayerLayout(kind=kind, tensors=tuple(tensors), num_bytes=offset, first_row=first_row)
