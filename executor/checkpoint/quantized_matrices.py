"""The quantized matrices of a checkpoint folder, as rows of ours."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from costmodel.families import family_named
from costmodel.model.encoded_model import without_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.layout import ComponentLayout, decoder_numbers, model_layers
from costmodel.model.quantized import QuantizedWeights
from costmodel.model.spec import ModelSpec
from costmodel.model.stored_scales import dtypes_of_scales
from costmodel.model.tensor_entry import TensorEntry
from costmodel.model.tensor_layout import TensorLayout
from executor.checkpoint.quantized_floats import Mxfp4Rows
from executor.checkpoint.quantized_layouts import Matrix
from executor.checkpoint.quantized_rows import QuantizedRows
from executor.checkpoint.quantized_tensors import find_rows, names_of
from executor.checkpoint.row_reader import RowRange
from executor.checkpoint.stored_blocks import STORED_DTYPES, read_whole
from executor.checkpoint.stored_tensors import StoredTensors
from executor.checkpoint.tensor_parts import TensorPart, component_parts
from executor.checkpoint.tensor_rows import TensorRows
from profiles.encodings import Kind
from profiles.errors import InputError
from profiles.units import MIB

# Scales of quantized activations and caches, which are not quantized here, and notes on an order
# of codes for GPUs.
UNREAD = re.compile(r".*\.(input|output|activation|[qkv])_scale|.*\.weight_format")
# Biases and zero points that some writers add where there are none.
VOID = re.compile(r".*\.(bias|weight_zero_point)")
LONGEST_VOID = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrices:
    """Readers of quantized matrices, by the names that these would have in a plain checkpoint."""

    readers: Mapping[str, QuantizedRows] = field(default_factory=dict)

    @property
    def entries(self) -> Iterator[TensorEntry]:
        """All tensors that are read, in the order of modules."""
        for reader in self.readers.values():
            yield from reader.stored.values()

    def may_ignore(self, name: str, entry: TensorEntry) -> bool:
        """Whether a tensor that nothing reads has no effect on a quantized checkpoint."""
        if not self.readers:
            return False
        if VOID.fullmatch(name) and entry.num_bytes <= LONGEST_VOID:
            return entry.dtype in STORED_DTYPES and not read_whole(entry).any()
        return UNREAD.fullmatch(name) is not None

    def has(self, spec: ModelSpec, index: int, layout: ComponentLayout, tensor: str) -> bool:
        """Whether any rows of a matrix of ours are quantized in the files, as in all experts."""
        return any(part.name in self.readers for part in _parts(spec, index, layout, tensor, 0))

    def rows_of(
        self,
        spec: ModelSpec,
        index: int,
        layout: ComponentLayout,
        plain: Mapping[str, TensorEntry],
        tensor: str,
        unit: int,
    ) -> Sequence[RowRange]:
        """Return all rows of a matrix of ours; ``plain`` has the tensors that are not quantized."""
        parts = list(_parts(spec, index, layout, tensor, unit))
        found = []
        for number, part in enumerate(parts):
            reader = self.readers.get(part.name)
            first, count = part.first_row, part.num_elements // _width(layout, tensor)
            if isinstance(reader, Mxfp4Rows):
                reader = reader.of_expert(unit, number, len(parts))
            rows = TensorRows(plain[part.name]) if reader is None else reader
            found.append(RowRange(reader=rows, first_row=first, num_rows=count))
        return found


def find_quantized(
    stored: StoredTensors, spec: ModelSpec, how: QuantizedWeights
) -> QuantizedMatrices:
    """Find the quantized matrices of a model; all that the description has encoded must be.

    Raises
    ------
    InputError
        For a plain matrix that should be quantized, and for tensors with another shape or dtype.
    """
    stacked = family_named(spec.family).stacked
    plain = without_encodings(spec)
    readers: dict[str, QuantizedRows] = {}
    for index, layer in enumerate(model_layers(plain)):
        encoded = _encoded_rows(spec, index)
        for layout in layer.components:
            for part in component_parts(plain, index, layout):
                tensor, row = _place(layout, part)
                is_stacked = tensor.name in stacked
                if len(tensor.shape) < 2 or is_stacked != (how.layout == "mxfp4"):
                    continue
                if part.name in readers:
                    continue
                matrix = _stored_matrix(part, tensor, layout, how)
                reader = find_rows(stored, part.name, matrix)
                if reader is not None:
                    readers[part.name] = reader
                elif _is_encoded(encoded, tensor.name, row):
                    raise _not_quantized(stored, part.name, matrix)
            _check_experts(stored, plain, index, layout, readers)
    return QuantizedMatrices(readers=readers)


def _check_experts(
    stored: StoredTensors,
    spec: ModelSpec,
    index: int,
    layout: ComponentLayout,
    readers: Mapping[str, QuantizedRows],
) -> None:
    """Refuse experts of a layer of which files have some plain and others quantized: they have one
    layout."""
    if layout.num_units == 1:
        return
    units = [
        [part.name for part in component_parts(spec, index, layout, range(unit, unit + 1))]
        for unit in range(layout.num_units)
    ]
    for names in units[1:]:
        for one, other in zip(units[0], names, strict=True):
            if (one in readers) != (other in readers):
                plain, quantized = (other, one) if one in readers else (one, other)
                raise InputError(
                    f"experts of checkpoint {stored.folder.name}",
                    got=f"plain {plain}, but quantized {quantized}",
                    allowed="experts of a layer that are all plain, or all quantized",
                )


def scale_dtype(stored: StoredTensors, how: QuantizedWeights) -> str | None:
    """Return the dtype of the scales of quantized integers; raises ``InputError`` for several."""
    if how.encoding.kind not in (Kind.INT4, Kind.INT8):
        return None
    found = dtypes_of_scales(stored.entries.values())
    if len(found) > 1:
        (_, one), (_, other) = list(found.items())[:2]
        raise InputError(
            f"scales of checkpoint {stored.folder.name}",
            got=f"{one.dtype} and {other.dtype} ({other.name})",
            allowed="one dtype",
        )
    return next(iter(found), None)


def _place(layout: ComponentLayout, part: TensorPart) -> tuple[TensorLayout, int]:
    """Return the tensor of ours that a part belongs to, and its first row in it."""
    offset = part.offset_bytes % layout.unit_bytes
    starts = [tensor.offset_bytes for tensor in layout.tensors]
    tensor = layout.tensors[bisect.bisect_right(starts, offset) - 1]
    return tensor, (offset - tensor.offset_bytes) // tensor.row_bytes


def _parts(
    spec: ModelSpec, index: int, layout: ComponentLayout, tensor: str, unit: int
) -> Iterator[TensorPart]:
    """Yield the parts of a whole matrix, which a layout may have in several."""
    own = [t for t in layout.tensors if t.name == tensor]
    shape = (sum(t.num_rows for t in own), own[0].shape[1])
    whole = replace(layout, tensors=(replace(own[0], shape=shape, first_row=0),))
    return component_parts(spec, index, whole, range(unit, unit + 1))


def _width(layout: ComponentLayout, tensor: str) -> int:
    return next(t.shape[1] for t in layout.tensors if t.name == tensor)


def _stored_matrix(
    part: TensorPart, tensor: TensorLayout, layout: ComponentLayout, how: QuantizedWeights
) -> Matrix:
    if how.layout == "mxfp4":
        outputs, inputs = tensor.shape
        return Matrix(outputs=outputs, inputs=inputs, how=how, count=layout.num_units)
    outputs, inputs = part.shape if part.strides is None else reversed(part.shape)
    return Matrix(outputs=outputs, inputs=inputs, how=how)


def _encoded_rows(spec: ModelSpec, index: int) -> Sequence[EncodedRows]:
    numbers = decoder_numbers(spec)
    number = numbers[index] if index < len(numbers) else -1
    return spec.encoded if number < 0 else spec.layer(number).encoded


def _is_encoded(encoded: Sequence[EncodedRows], tensor: str, row: int) -> bool:
    """Whether a row of a matrix is encoded in the description."""
    for part in encoded:
        if part.tensor == tensor:
            if row < part.rows:
                return bool(part.encoding)
            row -= part.rows
    return False


def _not_quantized(stored: StoredTensors, name: str, matrix: Matrix) -> InputError:
    wanted = names_of(name, matrix)[0]
    found = stored.find(name)
    if found is None:
        return stored.missing([wanted], len(names_of(name, matrix)))
    return InputError(
        f"tensor {found.name} of checkpoint {stored.folder.name}",
        got=f"dtype {found.dtype}, not quantized",
        allowed=f"{wanted} as quantization_config says",
    )
