"""How one tensor is stored: plain, quantized by us, or encoded as its file has it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.spec import DTYPE_BYTES, ModelSpec
from profiles.encodings import Encoding
from profiles.errors import InputError
from profiles.packing import Packing

# Tensors that keep float32 in models of any dtype, and are never packed: rounded ones would choose
# other experts, and kernels take sinks in float32.
FLOAT32_TENSORS = ("router.bias", "router.float32_weight", "attention.sinks")
# Vectors beside encoded rows, behind the name of the matrix and before the first of its rows.
TABLE, ORDER = ".table.", ".order."
ITEM_BYTES = DTYPE_BYTES | {"int32": 4}


def row_packing(num_elements: int, bits: int, group_size: int) -> Packing | None:
    """Return the packing of a row at ``bits`` an element; ``None`` where elements keep a dtype."""
    if bits >= 16:
        return None
    return Packing(num_elements=num_elements, bits=bits, group_size=group_size)


def packed_bytes(num_elements: int, bits: int, group_size: int) -> int:
    """Return the bytes of a row at ``bits`` an element, the scales of its groups included."""
    packing = row_packing(num_elements, bits, group_size)
    return packing.row_bytes if packing else num_elements * bits // 8


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """One tensor in its component: rows of ``row_bytes`` from ``offset_bytes`` on.

    A matrix whose rows are stored in several ways is several tensors of one name.

    Parameters
    ----------
    packing
        Of rows that are quantized when they are read from the checkpoint.
    encoding
        Of rows that the checkpoint has encoded.
    first_row
        Where the rows begin in their matrix.
    is_sorted
        Whether the inputs of encoded rows are sorted (see ``EncodedRows``).
    dtype
        Of elements that do not have the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    offset_bytes: int
    row_bytes: int
    packing: Packing | None = None
    encoding: Encoding | None = None
    first_row: int = 0
    is_sorted: bool = False
    dtype: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether elements are stored as they are, neither packed by us nor encoded."""
        return self.packing is None and self.encoding is None

    @property
    def matrix_name(self) -> str:
        """The name of the tensor, or of the matrix that it is stored beside."""
        return self.name.partition(TABLE)[0].partition(ORDER)[0]

    @property
    def table_name(self) -> str:
        """The vector with the scales that encoded rows share."""
        return f"{self.name}{TABLE}{self.first_row}"

    @property
    def order_name(self) -> str:
        """The vector with the numbers of sorted inputs."""
        return f"{self.name}{ORDER}{self.first_row}"

    @property
    def num_rows(self) -> int:
        """Rows of a matrix; a vector counts as one row."""
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


def plain_or_packed(
    name: str, shape: tuple[int, ...], spec: ModelSpec, bits: int, group_size: int
) -> TensorLayout:
    """Lay out a tensor in the model's dtype, or where ``bits`` are fewer a packed matrix."""
    is_float32 = name in FLOAT32_TENSORS
    is_packed = len(shape) == 2 and not is_float32
    packing = row_packing(shape[-1], bits, group_size) if is_packed else None
    dtype = "float32" if is_float32 else None
    return _tensor(name, shape, spec, packing=packing, dtype=dtype)


def _tensor(
    name: str,
    shape: tuple[int, ...],
    spec: ModelSpec,
    *,
    packing: Packing | None = None,
    dtype: str | None = None,
) -> TensorLayout:
    item_bytes = ITEM_BYTES[dtype or spec.dtype]
    row_bytes = packing.row_bytes if packing else shape[-1] * item_bytes
    return TensorLayout(
        name=name, shape=shape, offset_bytes=0, row_bytes=row_bytes, packing=packing, dtype=dtype
    )


def encoded_tensors(
    name: str, shape: tuple[int, ...], rows: Sequence[EncodedRows], spec: ModelSpec
) -> Iterator[TensorLayout]:
    """Yield the parts of a matrix that has encoded rows, and the vectors beside them."""
    if len(shape) != 2 or sum(part.rows for part in rows) != shape[0]:
        told = " + ".join(str(part.rows) for part in rows)
        raise InputError(f"encoded rows of {name}", got=told, allowed=f"rows of {list(shape)}")
    first, width = 0, shape[1]
    for part in rows:
        tensor = replace(_tensor(name, (part.rows, width), spec), first_row=first)
        first += part.rows
        if (how := part.how) is None:
            yield tensor
            continue
        if not how.fits(width):
            allowed = f"an encoding of rows of {width} elements"
            raise InputError(f"encoded rows of {name}", got=part.encoding, allowed=allowed)
        tensor = replace(
            tensor, encoding=how, row_bytes=how.row_bytes(width), is_sorted=part.is_sorted
        )
        yield tensor
        if how.has_table:
            count = how.table_elements(part.rows, width)
            yield _tensor(tensor.table_name, (count,), spec, dtype="float32")
        if part.is_sorted:
            yield _tensor(tensor.order_name, (width,), spec, dtype="int32")
