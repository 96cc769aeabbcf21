"""The offset of each tensor in its component's bytes. No torch.

A model is a list of layers in the order of the schedule: the embedding, the decoder layers, and
the output head cut into chunks of about a decoder layer's size. A layer consists of components.
Each component is one contiguous run of bytes, so that it moves as one copy and one read. A
placement cuts that run between two rows of a matrix, or between two experts; vectors are never cut.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.shapes import Shapes, component_shapes, embedding_shapes, head_shapes
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_layout import (
    TensorLayout,
    encoded_tensors,
    packed_bytes,
    plain_or_packed,
)
from profiles.aligned_io import PAGE_BYTES
from profiles.errors import InputError
from profiles.packing import DEFAULT_GROUP_SIZE
from profiles.units import MIB

# Tensors start on a cache line. (In the weight file, components start on a disk page. Experts do
# everywhere, so that each can be read by itself.)
TENSOR_ALIGNMENT = 64
# A matrix is cut at a multiple of so many rows. With other numbers of rows the results are not
# aligned, and a GPU multiplies several times slower.
CUT_ROWS = 8
EXPERTS = "experts"
# Bytes of a small chunk of the head.
SMALL_CHUNK_BYTES = 32 * MIB


def round_up(value: int, multiple: int) -> int:
    """Round ``value`` up to a whole number of ``multiple``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ComponentLayout:
    """A part of a layer with its own placement: a run of bytes that consists of equal units.

    Parameters
    ----------
    name
        The class of the component: components of one name share a placement.
    tensors
        The tensors of one unit; their offsets count from the start of the unit.
    unit_bytes
        Bytes of one unit, padding included.
    num_units
        Number of experts; one for every other component.
    first_row
        The vocabulary row at which a chunk of the head begins.
    """

    name: str
    tensors: tuple[TensorLayout, ...]
    unit_bytes: int
    num_units: int = 1
    first_row: int = 0

    @property
    def is_experts(self) -> bool:
        """Whether the units are experts, which are never cut, even where there is only one."""
        return self.name == EXPERTS

    @property
    def num_bytes(self) -> int:
        """Bytes of all units."""
        return self.unit_bytes * self.num_units

    @cached_property
    def unit_elements(self) -> int:
        """Elements of the matrices of one unit: a token costs two FLOP for each."""
        return sum(t.num_elements for t in self.tensors if len(t.shape) == 2)

    @property
    def num_matrix_elements(self) -> int:
        """Elements of the matrices of all units."""
        return self.unit_elements * self.num_units

    @cached_property
    def cut_bytes(self) -> int:
        """Bytes of the longest piece without a place to cut."""
        if self.is_experts:
            return self.unit_bytes
        pieces = (t.row_bytes * min(CUT_ROWS, t.num_rows) for t in self.tensors)
        return max(pieces, default=0)

    def units_between(self, start: int, end: int) -> range:
        """Return the units that overlap bytes [start, end)."""
        return range(start // self.unit_bytes, min(-(-end // self.unit_bytes), self.num_units))

    def cut_near(self, num_bytes: float) -> int:
        """Return the place to cut that is nearest to ``num_bytes`` from the start.

        Experts are cut between two units. Other components are cut at the start of a tensor, or
        after a multiple of ``CUT_ROWS`` rows of a matrix.
        """
        if num_bytes <= 0 or not self.tensors:
            return 0
        if num_bytes >= self.num_bytes:
            return self.num_bytes
        if self.is_experts:
            return round(num_bytes / self.unit_bytes) * self.unit_bytes
        starts = [t.offset_bytes for t in self.tensors]
        tensor = self.tensors[bisect.bisect_right(starts, num_bytes) - 1]
        wanted = (num_bytes - tensor.offset_bytes) / tensor.row_bytes
        below = min(int(wanted) // CUT_ROWS * CUT_ROWS, tensor.num_rows)
        above = min(below + CUT_ROWS, tensor.num_rows)
        row = below if wanted - below < above - wanted else above
        if row == tensor.num_rows:
            behind = bisect.bisect_right(starts, tensor.offset_bytes)
            return starts[behind] if behind < len(starts) else self.num_bytes
        return tensor.offset_bytes + row * tensor.row_bytes


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """The components of one layer of the schedule.

    ``kind`` is ``embed`` (rows are gathered, never staged), ``decoder`` or ``head``. A decoder
    layer with experts is two layers of the schedule, of the kinds ``attention`` and ``experts``.
    """

    kind: str
    components: tuple[ComponentLayout, ...]

    @property
    def staging(self) -> str:
        """The staging buffers in which the layer takes turns with others.

        Attention has buffers of its own, so that the next experts are loaded while the last ones
        are computed.
        """
        return "attention" if self.kind == "attention" else "layers"

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all components, padding included."""
        return sum(component.num_bytes for component in self.components)


@functools.lru_cache(maxsize=64)
def model_layers(
    spec: ModelSpec,
    weight_bits: int | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    *,
    has_small_chunks: bool = False,
) -> tuple[LayerLayout, ...]:
    """Lay out every layer of ``spec`` in the order in which the schedule visits them.

    Vectors keep the model's own dtype. Equal layers are the same object.

    Parameters
    ----------
    weight_bits
        The bits of an element of a matrix, without scales; ``None`` is the model's own dtype.
    has_small_chunks
        See ``has_small_chunks``.
    """
    bits = weight_bits or spec.full_bits
    pack = functools.partial(_lay_out, spec=spec, bits=bits, group_size=group_size)
    # Rows that are quantized again are no longer encoded.
    is_encoded = bits == spec.full_bits
    outside = spec.encoded if is_encoded else ()
    decoders = []
    for kind in spec.layer_kinds:
        encoded = kind.encoded if is_encoded else ()
        components = tuple(
            pack(name, shapes, encoded=encoded, num_units=count)
            for name, (shapes, count) in component_shapes(spec, kind).items()
        )
        parts = {"decoder": components}
        if kind.experts is not None:
            parts = {"attention": components[:1], "experts": components[1:]}
        decoders.append([LayerLayout(kind=name, components=c) for name, c in parts.items()])
    embedding = embedding_shapes(spec)
    embed = LayerLayout(
        kind="embed",
        components=(pack("embedding", embedding, encoded=outside),) if embedding else (),
    )
    chunk_bytes = max(part.num_bytes for parts in decoders for part in parts)
    if has_small_chunks:
        chunk_bytes = min(chunk_bytes, SMALL_CHUNK_BYTES)
    # A stage without the head hands over hidden states in a layer without weights.
    head = [LayerLayout(kind="head", components=())]
    if spec.has_head:
        row_bytes = _head_row_bytes(spec, outside)
        row_bytes = row_bytes or packed_bytes(spec.head_width, bits, group_size)
        chunk_rows = _head_chunk_rows(spec.vocab_size, row_bytes, chunk_bytes)
        head = []
        for first in range(0, spec.vocab_size, chunk_rows):
            num_rows = min(chunk_rows, spec.vocab_size - first)
            shapes = head_shapes(spec, num_rows, is_first=first == 0)
            rows = _of_chunk(outside, num_rows)
            chunk = pack("head", shapes, encoded=rows, first_row=first)
            head.append(LayerLayout(kind="head", components=(chunk,)))
    visited = (part for kind in spec.layer_order for part in decoders[kind])
    return (embed, *visited, *head)


def has_small_chunks(spec: ModelSpec, *, has_gpu: bool) -> bool:
    """Whether the chunks of a model's head are small: those of mixtures on a machine without a GPU.

    A CPU that loads experts on demand reads none of them while it computes the head. It then has
    time to read the head, which needs two buffers of a chunk.
    """
    return not has_gpu and EXPERTS in spec.component_names


def _head_chunk_rows(num_rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Return the rows of each chunk of the head, for chunks of about ``chunk_bytes``."""
    num_chunks = max(1, round(num_rows * row_bytes / chunk_bytes))
    return round_up(-(-num_rows // num_chunks), CUT_ROWS)


@functools.lru_cache(maxsize=64)
def decoder_numbers(spec: ModelSpec) -> tuple[int, ...]:
    """Return the number of the decoder layer that each layer of ``model_layers`` belongs to.

    The list starts with -1 for the embedding and ends with the last decoder layer.
    """
    visits = [1 if kind.experts is None else 2 for kind in spec.layer_kinds]
    order = enumerate(spec.layer_order)
    return (-1, *(number for number, kind in order for _ in range(visits[kind])))


def token_elements(layer: LayerLayout, experts: ExpertsSpec | None) -> int:
    """Return the elements of the matrices that one token passes through in a layer."""
    used = experts.experts_per_token if experts else 1
    return sum(
        component.unit_elements * (used if component.is_experts else 1)
        for component in layer.components
    )


def unpacked_layout(component: ComponentLayout, spec: ModelSpec) -> ComponentLayout:
    """Lay out the tensors of a packed component in the model's own dtype."""
    return _lay_out(
        component.name,
        {tensor.name: tensor.shape for tensor in component.tensors},
        spec=spec,
        bits=spec.full_bits,
        group_size=DEFAULT_GROUP_SIZE,
        num_units=component.num_units,
        first_row=component.first_row,
    )


def _lay_out(
    name: str,
    shapes: Shapes,
    *,
    spec: ModelSpec,
    bits: int,
    group_size: int,
    encoded: Sequence[EncodedRows] = (),
    num_units: int = 1,
    first_row: int = 0,
) -> ComponentLayout:
    made: list[TensorLayout] = []
    for tensor_name, shape in shapes.items():
        rows = [part for part in encoded if part.tensor == tensor_name]
        if rows:
            made += encoded_tensors(tensor_name, shape, rows, spec)
        else:
            made.append(plain_or_packed(tensor_name, shape, spec, bits, group_size))
    offset = 0
    tensors = []
    # Vectors first: they are never cut.
    for unplaced in sorted(made, key=lambda tensor: len(tensor.shape)):
        tensor = replace(unplaced, offset_bytes=offset)
        tensors.append(tensor)
        offset = round_up(tensor.end_bytes, TENSOR_ALIGNMENT)
    if name == EXPERTS:
        offset = round_up(offset, PAGE_BYTES)
    return ComponentLayout(
        name=name,
        tensors=tuple(tensors),
        unit_bytes=offset,
        num_units=num_units,
        first_row=first_row,
    )


def _of_chunk(outside: Sequence[EncodedRows], num_rows: int) -> list[EncodedRows]:
    """Return how the rows of a chunk of the head are stored; all rows of the head are alike."""
    return [
        replace(part, rows=num_rows) if part.tensor == "head.weight" else part for part in outside
    ]


def _head_row_bytes(spec: ModelSpec, outside: Sequence[EncodedRows]) -> int | None:
    parts = [part for part in outside if part.tensor == "head.weight"]
    if len(parts) > 1 or any(part.how and part.how.has_table for part in parts):
        raise InputError(
            "head.weight", got="rows with tables, or in several encodings", allowed="rows alike"
        )
    how = parts[0].how if parts else None
    return how.row_bytes(spec.head_width) if how and how.fits(spec.head_width) else None
