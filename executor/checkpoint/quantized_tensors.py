"""The tensors of quantized modules in a checkpoint: found by their names, and checked.

Shapes and dtypes are checked when a checkpoint is opened, values when they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from costmodel.model.quantized import QuantizedWeights
from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint.quantized_rows import (
    AwqRows,
    Bnb4Rows,
    Bnb8Rows,
    CompressedFp8Rows,
    Fp8Rows,
    GptqRows,
    GptqV2Rows,
    Int8Rows,
    Mxfp4Rows,
    PackedIntegerRows,
    QuantizedRows,
)
from executor.checkpoint.stored_blocks import read_whole
from executor.checkpoint.stored_tensors import FLOATS, StoredTensors
from profiles.encodings import FOUR_BIT_VALUES, NESTED_RUN, NESTED_VALUES
from profiles.errors import InputError

SCALES = ("F16", "BF16", "F32")
FP8_SCALES = (*SCALES, "F8_E8M0", "U8")
# Longer than any description of a quantized tensor.
LONGEST_STATE = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix of a module: ``outputs`` rows of ``inputs`` elements, in ``count`` experts."""

    outputs: int
    inputs: int
    how: QuantizedWeights
    count: int = 1

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.how.encoding.num_groups(self.inputs)

    @property
    def bits(self) -> int:
        """Bits of an element's code."""
        return 8 * self.how.encoding.block_bytes // self.how.encoding.block_elements

    def words(self, codes: int) -> int:
        """Words of int32 that have so many codes."""
        return -(-codes * self.bits // 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a module: its shapes, any of which is right, and its dtypes."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayout:
    """How one layout stores a matrix.

    Parameters
    ----------
    parts
        The tensors of a matrix, by the ends of their names; the first one has the codes.
    rows
        What reads them.
    multiples
        What the outputs and inputs of a matrix are multiples of.
    """

    parts: Callable[[Matrix], Mapping[str, Part]]
    rows: type[QuantizedRows]
    multiples: Callable[[Matrix], tuple[int, int]] = field(default=lambda _: (1, 1))


def _part(*shapes: tuple[int, ...], dtypes: tuple[str, ...], is_optional: bool = False) -> Part:
    return Part(shapes=shapes, dtypes=dtypes, is_optional=is_optional)


def _gptq(m: Matrix) -> dict[str, Part]:
    return {
        "qweight": _part((m.words(m.inputs), m.outputs), dtypes=("I32",)),
        "qzeros": _part((m.groups, m.words(m.outputs)), dtypes=("I32",)),
        "scales": _part((m.groups, m.outputs), dtypes=SCALES),
        "g_idx": _part((m.inputs,), dtypes=("I32",), is_optional=not m.how.is_sorted),
    }


def _awq(m: Matrix) -> dict[str, Part]:
    return {
        "qweight": _part((m.inputs, m.words(m.outputs)), dtypes=("I32",)),
        "qzeros": _part((m.groups, m.words(m.outputs)), dtypes=("I32",)),
        "scales": _part((m.groups, m.outputs), dtypes=SCALES),
    }


def _packed(m: Matrix) -> dict[str, Part]:
    parts = {
        "weight_packed": _part((m.outputs, m.words(m.inputs)), dtypes=("I32",)),
        "weight_scale": _part((m.outputs, m.groups), dtypes=SCALES),
        "weight_shape": _part((2,), dtypes=("I64", "I32"), is_optional=True),
        "weight_g_idx": _part((m.inputs,), dtypes=("I32",), is_optional=not m.how.is_sorted),
    }
    if m.how.encoding.zero_bits:
        parts["weight_zero_point"] = _part((m.words(m.outputs), m.groups), dtypes=("I32",))
    return parts


def _int8(m: Matrix) -> dict[str, Part]:
    return {
        "weight": _part((m.outputs, m.inputs), dtypes=("I8",)),
        "weight_scale": _part((m.outputs, 1), (m.outputs,), dtypes=SCALES),
    }


def _fp8(m: Matrix) -> dict[str, Part]:
    return _floats(m, "weight_scale_inv")


def _compressed_fp8(m: Matrix) -> dict[str, Part]:
    return _floats(m, "weight_scale")


def _floats(m: Matrix, scale: str) -> dict[str, Part]:
    how = m.how.encoding
    shapes: list[tuple[int, ...]] = [(-(-m.outputs // how.tile_rows), how.tile_scales(m.inputs))]
    if not how.tile_columns:
        # One scale for each output, or one for all.
        shapes += [(m.outputs,), (), (1,), (1, 1)]
    return {
        "weight": _part((m.outputs, m.inputs), dtypes=("F8_E4M3",)),
        scale: _part(*shapes, dtypes=FP8_SCALES),
    }


def _bnb8(m: Matrix) -> dict[str, Part]:
    return {
        "weight": _part((m.outputs, m.inputs), dtypes=("I8",)),
        "SCB": _part((m.outputs,), dtypes=("F32",)),
    }


def _bnb4(m: Matrix) -> dict[str, Part]:
    size, blocks = m.outputs * m.inputs // 2, m.outputs * m.groups
    is_nested = m.how.encoding.scale == "code"
    parts = {
        "weight": _part((size, 1), (1, size), (size,), dtypes=("U8",)),
        "weight.absmax": _part((blocks,), dtypes=("U8",) if is_nested else ("F32",)),
        "weight.quant_map": _part((FOUR_BIT_VALUES,), dtypes=("F32",)),
    }
    if is_nested:
        factors = -(-blocks // NESTED_RUN)
        parts["weight.nested_absmax"] = _part((factors,), dtypes=("F32",))
        parts["weight.nested_quant_map"] = _part((NESTED_VALUES,), dtypes=("F32",))
    return parts


def _mxfp4(m: Matrix) -> dict[str, Part]:
    shape = (m.count, m.outputs, m.inputs // 32)
    return {
        "_blocks": _part((*shape, 16), dtypes=("U8",)),
        "_scales": _part(shape, dtypes=("U8",)),
    }


def _word_multiples(m: Matrix) -> tuple[int, int]:
    return 32 // m.bits, 32 // m.bits


STORED_LAYOUTS: Mapping[str, StoredLayout] = {
    "gptq": StoredLayout(parts=_gptq, rows=GptqRows, multiples=_word_multiples),
    "gptq_v2": StoredLayout(parts=_gptq, rows=GptqV2Rows, multiples=_word_multiples),
    "awq": StoredLayout(parts=_awq, rows=AwqRows, multiples=lambda m: (8, 1)),
    "pack-quantized": StoredLayout(parts=_packed, rows=PackedIntegerRows),
    "int-quantized": StoredLayout(parts=_int8, rows=Int8Rows),
    "fp8": StoredLayout(parts=_fp8, rows=Fp8Rows),
    "float-quantized": StoredLayout(parts=_compressed_fp8, rows=CompressedFp8Rows),
    "bnb8": StoredLayout(parts=_bnb8, rows=Bnb8Rows),
    "bnb4": StoredLayout(
        parts=_bnb4, rows=Bnb4Rows, multiples=lambda m: (1, m.how.encoding.group_elements)
    ),
    "mxfp4": StoredLayout(parts=_mxfp4, rows=Mxfp4Rows, multiples=lambda m: (1, 32)),
}


def find_rows(stored: StoredTensors, tensor: str, matrix: Matrix) -> QuantizedRows | None:
    """Find the tensors of a module; ``None`` where its matrix is not quantized.

    Parameters
    ----------
    tensor
        The name that its matrix would have in a plain checkpoint.

    Raises
    ------
    InputError
        Where a tensor is missing, or has another shape or dtype.
    """
    layout = STORED_LAYOUTS[matrix.how.layout]
    module = tensor.removesuffix("weight")
    parts = layout.parts(matrix)
    codes = stored.find(module + next(iter(parts)))
    if codes is None or codes.dtype in FLOATS:
        return None
    label = f"{module.removesuffix('.')} of checkpoint {stored.folder.name}"
    _check_multiples(layout, matrix, label)
    entries = {}
    for end, part in parts.items():
        entry = stored.find(module + end)
        if entry is not None:
            _check_part(entry, part, stored)
            entries[end] = entry
        elif not part.is_optional:
            raise stored.missing([module + end], len(parts))
    how = matrix.how.encoding
    own: dict[str, Any] = {"is_sorted": matrix.how.is_sorted}
    if layout.rows is Bnb4Rows:
        entries |= (state := _state_entry(stored, module))
        own = {"offset": _offset(next(iter(state.values())), matrix, label)}
    return layout.rows(
        name=label,
        stored=entries,
        encoding=how,
        num_rows=matrix.outputs,
        num_elements=matrix.inputs,
        **own,
    )


def names_of(tensor: str, matrix: Matrix) -> list[str]:
    """Return the names of a module's tensors, that of the codes first."""
    module = tensor.removesuffix("weight")
    return [module + end for end in STORED_LAYOUTS[matrix.how.layout].parts(matrix)]


def _check_multiples(layout: StoredLayout, matrix: Matrix, label: str) -> None:
    outputs, inputs = layout.multiples(matrix)
    if matrix.outputs % outputs or matrix.inputs % inputs:
        raise InputError(
            label,
            got=f"{matrix.outputs} x {matrix.inputs}",
            allowed=f"multiples of {outputs} and {inputs} in the layout {matrix.how.layout}",
        )


def _check_part(entry: TensorEntry, part: Part, stored: StoredTensors) -> None:
    label = f"tensor {entry.name} of checkpoint {stored.folder.name}"
    if entry.shape not in part.shapes:
        raise InputError(
            label,
            got=f"shape {list(entry.shape)}",
            allowed=f"{list(part.shapes[0])} as its config says",
        )
    if entry.dtype not in part.dtypes:
        raise InputError(label, got=f"dtype {entry.dtype}", allowed=", ".join(part.dtypes))


def _state_entry(stored: StoredTensors, module: str) -> dict[str, TensorEntry]:
    """Find the description of a 4-bit tensor of bitsandbytes, named by the kind of its floats."""
    for kind in ("nf4", "fp4"):
        end = f"weight.quant_state.bitsandbytes__{kind}"
        if (entry := stored.find(module + end)) is not None:
            return {end: entry}
    raise stored.missing([f"{module}weight.quant_state.bitsandbytes__nf4"], 1)


def _offset(entry: TensorEntry, matrix: Matrix, label: str) -> float | None:
    """Check the description of a 4-bit tensor, and return the offset of nested scales."""
    is_nested = matrix.how.encoding.scale == "code"
    wanted = {
        "blocksize": matrix.how.encoding.group_elements,
        "shape": [matrix.outputs, matrix.inputs],
    }
    if is_nested:
        wanted["nested_blocksize"] = NESTED_RUN
    state: Any = None
    if entry.dtype == "U8" and 0 < entry.num_bytes <= LONGEST_STATE:
        try:
            state = json.loads(bytes(read_whole(entry).tolist()))
        except (ValueError, RecursionError):
            state = None
    if not isinstance(state, dict):
        raise InputError(f"quant_state of {label}", got="no JSON object", allowed="an object")
    for key, value in wanted.items():
        if state.get(key) != value:
            raise InputError(f"{key} of {label}", got=state.get(key), allowed=str(value))
    offset = state.get("nested_offset")
    if not is_nested:
        return None
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise InputError(f"nested_offset of {label}", got=offset, allowed="a number")
    return offset
