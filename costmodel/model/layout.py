"""Where each tensor of a model is inside its component's run of bytes. No torch.

A model is a list of layers in the order of the schedule: the embedding, the decoder layers, and
the output head cut into chunks of about a decoder layer's size. A layer is components, each one
contiguous run of bytes, so that a component moves as one copy and one read. A placement cuts that
run between two rows of a matrix, or between two experts; vectors are never cut.

Matrices that multiply the same input are stacked into one (``qkv``, ``gate_up``), because one
large product is faster than several small ones.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from costmodel.model.layer_spec import LayerSpec, MlpSpec, NormSpec
from costmodel.model.spec import ModelSpec
from profiles.packing import DEFAULT_GROUP_SIZE, Packing

# Tensors start on a cache line, layers of the weight file on a disk page.
TENSOR_ALIGNMENT = 64
# A matrix is cut between so many rows: a GPU multiplies with other numbers of them, whose results
# are not aligned, several times slower.
CUT_ROWS = 8


def round_up(value: int, multiple: int) -> int:
    """Round ``value`` up to a whole number of ``multiple``."""
    return -(-value // multiple) * multiple


def row_packing(num_elements: int, bits: int, group_size: int) -> Packing | None:
    """How a row of elements is packed at ``bits`` each; ``None`` where they keep a dtype."""
    if bits >= 16:
        return None
    return Packing(num_elements=num_elements, bits=bits, group_size=group_size)


def packed_bytes(num_elements: int, bits: int, group_size: int) -> int:
    """Bytes of one row of elements at ``bits`` each; below 16 bits, with its groups' scales."""
    packing = row_packing(num_elements, bits, group_size)
    return packing.row_bytes if packing else num_elements * bits // 8


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """One tensor in its layer: rows of ``row_bytes`` from ``offset_bytes`` on, perhaps packed."""

    name: str
    shape: tuple[int, ...]
    offset_bytes: int
    row_bytes: int
    packing: Packing | None = None

    @property
    def num_rows(self) -> int:
        """Rows that a cut may fall between; a vector counts as one."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @cached_property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_rows * self.row_bytes

    @property
    def end_bytes(self) -> int:
        """Offset just behind the tensor."""
        return self.offset_bytes + self.num_bytes


@dataclass(frozen=True, kw_only=True)
class ComponentLayout:
    """A part of a layer that is placed as one: a run of bytes of equal units.

    Parameters
    ----------
    name
        Its class: components of one name share a placement.
    tensors
        Those of one unit, from the start of the unit.
    unit_bytes
        Bytes of one unit, padding included.
    num_units
        Experts; one for everything else.
    first_row
        The vocabulary row at which a chunk of the head begins.
    """

    name: str
    tensors: tuple[TensorLayout, ...]
    unit_bytes: int
    num_units: int = 1
    first_row: int = 0

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
        """Bytes of the longest piece that is never cut."""
        if self.num_units > 1:
            return self.unit_bytes
        pieces = (t.row_bytes * min(CUT_ROWS, t.num_rows) for t in self.tensors)
        return max(pieces, default=0)

    def cut_near(self, num_bytes: float) -> int:
        """Find the place to cut that is nearest to ``num_bytes`` from the start: between two units,
        or in a single one the start of a tensor, or a whole number of ``CUT_ROWS`` into a
        matrix."""
        if num_bytes <= 0 or not self.tensors:
            return 0
        if num_bytes >= self.num_bytes:
            return self.num_bytes
        if self.num_units > 1:
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
    """The components that one visit of the schedule computes with.

    ``kind`` is ``embed`` (rows are gathered, never staged), ``decoder``, ``head``; or, of a decoder
    layer with experts, ``attention`` and ``experts``, which are visited one after the other.
    """

    kind: str
    components: tuple[ComponentLayout, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all components, padding included."""
        return sum(component.num_bytes for component in self.components)


@functools.lru_cache(maxsize=64)
def model_layers(
    spec: ModelSpec, weight_bits: int | None = None, group_size: int = DEFAULT_GROUP_SIZE
) -> tuple[LayerLayout, ...]:
    """Lay out every layer of ``spec`` in the order in which the schedule visits them.

    ``weight_bits`` is what an element of a matrix takes, scales apart; ``None`` is the model's
    own dtype. Vectors keep that dtype. Equal layers are one object.
    """
    bits = weight_bits or spec.full_bits
    pack = functools.partial(_lay_out, spec=spec, bits=bits, group_size=group_size)
    decoders = []
    for kind in spec.layer_kinds:
        components = tuple(
            pack(name, shapes, num_units=count)
            for name, (shapes, count) in component_shapes(spec, kind).items()
        )
        parts = {"decoder": components}
        if kind.experts is not None:
            parts = {"attention": components[:1], "experts": components[1:]}
        decoders.append([LayerLayout(kind=name, components=c) for name, c in parts.items()])
    embedding = _embedding_shapes(spec)
    embed = LayerLayout(
        kind="embed", components=(pack("embedding", embedding),) if embedding else ()
    )
    row_bytes = packed_bytes(spec.hidden_size, bits, group_size)
    chunk_bytes = max(part.num_bytes for parts in decoders for part in parts)
    num_chunks = max(1, round(spec.vocab_size * row_bytes / chunk_bytes))
    head = (
        LayerLayout(kind="head", components=(pack("head", shapes, first_row=first),))
        for first, shapes in _head_shapes(spec, num_chunks)
    )
    visited = (part for kind in spec.layer_order for part in decoders[kind])
    return (embed, *visited, *head)


@functools.lru_cache(maxsize=64)
def decoder_numbers(spec: ModelSpec) -> tuple[int, ...]:
    """Return the number of the decoder layer that each layer of ``model_layers`` is a part of,
    from the embedding, which is of none, to the last decoder layer."""
    visits = [1 if kind.experts is None else 2 for kind in spec.layer_kinds]
    order = enumerate(spec.layer_order)
    return (-1, *(number for number, kind in order for _ in range(visits[kind])))


def unpacked_layout(component: ComponentLayout, spec: ModelSpec) -> ComponentLayout:
    """Lay out the tensors of a packed component as they are in the model's own dtype."""
    return _lay_out(
        component.name,
        {tensor.name: tensor.shape for tensor in component.tensors},
        spec=spec,
        bits=spec.full_bits,
        group_size=DEFAULT_GROUP_SIZE,
        num_units=component.num_units,
        first_row=component.first_row,
    )


Shapes = dict[str, tuple[int, ...]]


def _norm_shapes(spec: ModelSpec, norm: NormSpec, name: str) -> Shapes:
    weight: Shapes = {f"{name}.weight": (spec.hidden_size,)}
    return weight if norm.kind == "rms" else weight | {f"{name}.bias": (spec.hidden_size,)}


def _half_norm_shapes(spec: ModelSpec, layer: LayerSpec, half: str) -> Shapes:
    names = {"before": f"{half}_norm", "after": f"{half}_output_norm"}
    shapes: Shapes = {}
    for place in layer.norm_places:
        shapes |= _norm_shapes(spec, layer.norm, names[place])
    return shapes


def component_shapes(spec: ModelSpec, layer: LayerSpec) -> dict[str, tuple[Shapes, int]]:
    """Return the tensors of one unit of each component of a layer, and how many units it has."""
    hidden, mlp, experts = spec.hidden_size, layer.mlp, layer.experts
    components = {"attention": (_attention_shapes(spec, layer), 1)}
    if mlp is not None:
        shapes = _half_norm_shapes(spec, layer, "mlp") | _mlp_shapes(hidden, mlp, "")
        return components | {"mlp": (shapes, 1)}
    assert experts is not None
    router = _half_norm_shapes(spec, layer, "mlp")
    if experts.router.has_bias:
        router["router.bias"] = (experts.num_experts,)
    router["router.weight"] = (experts.num_experts, hidden)
    if experts.gates_shared:
        router["shared_gate.weight"] = (1, hidden)
    components["router"] = router, 1
    if experts.shared is not None:
        components["shared_expert"] = _mlp_shapes(hidden, experts.shared, "shared_"), 1
    expert = _mlp_shapes(hidden, experts.expert, "expert_")
    return components | {"experts": (expert, experts.num_experts)}


def _attention_shapes(spec: ModelSpec, layer: LayerSpec) -> Shapes:
    attention, hidden = layer.attention, spec.hidden_size
    shapes = _half_norm_shapes(spec, layer, "attention")
    if attention.qkv_bias:
        shapes["qkv.bias"] = (attention.qkv_size,)
    if attention.qk_norm == "head":
        shapes |= {"q_norm.weight": (attention.head_dim,), "k_norm.weight": (attention.head_dim,)}
    if attention.qk_norm == "projection":
        shapes |= {"q_norm.weight": (attention.query_size,), "k_norm.weight": (attention.kv_size,)}
    if attention.output_bias:
        shapes["output.bias"] = (hidden,)
    qkv, query = attention.qkv_size, attention.query_size
    return shapes | {"qkv.weight": (qkv, hidden), "output.weight": (hidden, query)}


def _mlp_shapes(hidden: int, mlp: MlpSpec, prefix: str) -> Shapes:
    up = f"{prefix}gate_up" if mlp.is_gated else f"{prefix}up"
    shapes: Shapes = {}
    if mlp.has_bias:
        shapes |= {f"{up}.bias": (mlp.inner_rows,), f"{prefix}down.bias": (hidden,)}
    shapes |= {f"{up}.weight": (mlp.inner_rows, hidden)}
    return shapes | {f"{prefix}down.weight": (hidden, mlp.size)}


def _embedding_shapes(spec: ModelSpec) -> Shapes:
    shapes: Shapes = {}
    if spec.embedding.has_positions:
        rows = spec.max_positions + spec.embedding.position_offset
        shapes["positions.weight"] = (rows, spec.hidden_size)
    if not spec.head.is_tied:
        shapes["tokens.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _head_shapes(spec: ModelSpec, num_chunks: int) -> Iterator[tuple[int, Shapes]]:
    """Yield each chunk of the head: its first row and its shapes."""
    rows_per_chunk = round_up(-(-spec.vocab_size // num_chunks), CUT_ROWS)
    for first in range(0, spec.vocab_size, rows_per_chunk):
        rows = min(rows_per_chunk, spec.vocab_size - first)
        shapes = _norm_shapes(spec, spec.final_norm, "final_norm") if first == 0 else {}
        yield first, shapes | {"head.weight": (rows, spec.hidden_size)}


def _lay_out(
    name: str,
    shapes: Shapes,
    *,
    spec: ModelSpec,
    bits: int,
    group_size: int,
    num_units: int = 1,
    first_row: int = 0,
) -> ComponentLayout:
    offset = 0
    tensors = []
    # Vectors first: they are never cut.
    for tensor_name, shape in sorted(shapes.items(), key=lambda item: len(item[1])):
        packing = row_packing(shape[-1], bits, group_size) if len(shape) == 2 else None
        row_bytes = packing.row_bytes if packing else shape[-1] * spec.dtype_bytes
        tensor = TensorLayout(
            name=tensor_name,
            shape=shape,
            offset_bytes=offset,
            row_bytes=row_bytes,
            packing=packing,
        )
        tensors.append(tensor)
        offset = round_up(tensor.end_bytes, TENSOR_ALIGNMENT)
    return ComponentLayout(
        name=name,
        tensors=tuple(tensors),
        unit_bytes=offset,
        num_units=num_units,
        first_row=first_row,
    )
