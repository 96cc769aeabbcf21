"""Which matrices of a model are encoded, by the ``quantization_config`` of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.family import Family
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.quantized import QuantizedWeights
from costmodel.model.shapes import component_shapes, head_shapes
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import stacked_rows
from profiles.errors import InputError

# Matrices that are decoded when they are read, besides those of ``encoded_model``: tables whose
# rows are looked up, and what is beside tables.
DECODED = (
    "tokens.weight",
    "positions.weight",
    "input_projection.weight",
    "output_projection.weight",
)
# Layouts whose experts are one tensor for all of them. Others have a module for each expert.
_STACKED = ("mxfp4",)
# Layouts that encode modules with transposed matrices (``Conv1D``), too.
_TRANSPOSED = ("gptq", "gptq_v2", "bnb4", "bnb8")
# Where models for images have the modules of their decoder, by the age of transformers.
HEAD = "lm_head"
_DECODERS = {
    "model.": ("model.language_model.", "model.text_model.", "language_model.model."),
    HEAD: ("language_model.lm_head",),
}


def with_quantized(
    spec: ModelSpec, family: Family, how: QuantizedWeights, *, is_text_part: bool
) -> ModelSpec:
    """Return a model with the encodings that its config names.

    Parameters
    ----------
    is_text_part
        Whether the config is of a model for images, in which modules have longer names.
    """
    found = {number: _matrices(spec, number) for number in range(-1, spec.num_layers)}

    @cache
    def is_plain(module: str) -> bool:
        # Configs of all families call the head by its common name.
        own = HEAD if module == family.head else module
        names = {module, own, *(_longer(own) if is_text_part else ())}
        return any(how.skips(name) for name in names)

    def rows_of(number: int, name: str) -> list[EncodedRows]:
        layer = spec.layer(max(number, 0))
        if not may_be_encoded(spec, layer, family, how, name):
            return []
        first, *others = _modules_of_experts(spec, family, layer, number, name)
        for modules in others:
            for one, other in zip(first, modules, strict=True):
                if is_plain(one) != is_plain(other):
                    raise _mixed_experts(spec, *((one, other) if is_plain(one) else (other, one)))
        counts = stacked_rows(layer, name, found[number][name], len(first))
        return [
            EncodedRows(tensor=name, rows=count)
            if is_plain(module)
            else EncodedRows(
                tensor=name,
                rows=count,
                encoding=how.encoding.name,
                is_sorted=how.is_sorted,
            )
            for module, count in zip(first, counts, strict=True)
        ]

    return with_encodings(spec, rows_of)


def may_be_encoded(
    spec: ModelSpec, layer: LayerSpec, family: Family, how: QuantizedWeights, name: str
) -> bool:
    """Whether a matrix keeps the encoding that its modules have.

    Others are decoded when they are read: the head where its chunks would need parts of a table,
    and rows in another order than the file's where they share scales.
    """
    module = name.rpartition(".")[0]
    if name in DECODED or (name in family.stacked) != (how.layout in _STACKED):
        return False
    if name == "head.weight":
        return not (spec.head.is_tied or how.encoding.has_table or how.is_sorted)
    if module in family.transposed:
        return how.layout in _TRANSPOSED
    if module in family.row_blocks and how.encoding.has_table:
        rows = how.encoding.tile_rows
        blocks = family.row_blocks[module](layer)
        return rows > 0 and not any(n % rows for block in blocks for n in block)
    return True


def _modules_of_experts(
    spec: ModelSpec, family: Family, layer: LayerSpec, number: int, name: str
) -> Iterator[list[str]]:
    """Yield the modules that make one of our matrices, of each expert that has a module."""
    has_own = name.startswith("expert_") and name not in family.stacked
    for expert in range(layer.num_experts if has_own else 1):
        tensors = family.tensor_names(spec, name, number, expert)
        yield [tensor.rpartition(".")[0] for tensor in tensors]


def _mixed_experts(spec: ModelSpec, plain: str, quantized: str) -> InputError:
    return InputError(
        f"quantization_config of {spec.name}",
        got=f"plain {plain}, but quantized {quantized}",
        allowed="experts of a layer that are all plain, or all quantized",
    )


def _matrices(spec: ModelSpec, number: int) -> Mapping[str, int]:
    """Return the rows of each matrix of a layer, or of the head."""
    if number < 0:
        shapes = [head_shapes(spec, spec.vocab_size, is_first=True)]
    else:
        shapes = [shapes for shapes, _ in component_shapes(spec, spec.layer(number)).values()]
    return {name: shape[0] for found in shapes for name, shape in found.items()}


def _longer(module: str) -> Iterable[str]:
    for own, others in _DECODERS.items():
        if module.startswith(own):
            yield from (other + module.removeprefix(own) for other in others)
