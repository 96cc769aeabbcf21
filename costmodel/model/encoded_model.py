"""The description of a model whose checkpoint has encoded matrices. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from costmodel.model.encoded_rows import EncodedRows, join_rows
from costmodel.model.shapes import Shapes, component_shapes, embedding_shapes, head_shapes
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_layout import FLOAT32_TENSORS

# For the number of a layer (-1 outside of layers) and one of our matrices, how its rows are stored.
# Nothing stands for a matrix in the model's dtype.
RowsOf = Callable[[int, str], Sequence[EncodedRows]]
# Matrices that are decoded when they are read, should files have them encoded: those that are
# multiplied in float32, and routers, which choose other experts where they are rounded.
DECODED = (*FLOAT32_TENSORS, "router.weight")


def with_encodings(spec: ModelSpec, rows_of: RowsOf) -> ModelSpec:
    """Return a model with the encodings of its matrices, ``DECODED`` ones aside; layers that differ
    in them are of other kinds."""
    layers = []
    for number in range(spec.num_layers):
        layer = spec.layer(number)
        shapes = [shapes for shapes, _ in component_shapes(spec, layer).values()]
        layers.append(replace(layer, encoded=_encoded(number, shapes, rows_of)))
    kinds = tuple(dict.fromkeys(layers))
    numbers = {kind: i for i, kind in enumerate(kinds)}
    outside = [embedding_shapes(spec), head_shapes(spec, spec.vocab_size, is_first=True)]
    return replace(
        spec,
        layer_kinds=kinds,
        layer_order=tuple(numbers[layer] for layer in layers),
        encoded=_encoded(-1, outside, rows_of),
    )


def without_encodings(spec: ModelSpec) -> ModelSpec:
    """Return the same model with all matrices in its dtype."""
    return with_encodings(spec, lambda number, name: ())


def _encoded(number: int, components: Sequence[Shapes], rows_of: RowsOf) -> tuple[EncodedRows, ...]:
    found: list[EncodedRows] = []
    for shapes in components:
        for name, shape in shapes.items():
            rows = () if len(shape) != 2 or name in DECODED else join_rows(rows_of(number, name))
            if any(part.encoding for part in rows):
                found += rows
    return tuple(found)
