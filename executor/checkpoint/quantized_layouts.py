"""The tensors in which each layout stores a quantized matrix: names, shapes, dtypes, readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from costmodel.model.quantized import QuantizedWeights
from executor.checkpoint.quantized_floats import Bnb4Rows, CompressedFp8Rows, Fp8Rows, Mxfp4Rows
from executor.checkpoint.quantized_integers import (
    AwqRows,
    Bnb8Rows,
    GptqRows,
    GptqV2Rows,
    Int8Rows,
    PackedIntegerRows,
)
from executor.checkpoint.quantized_rows import QuantizedRows
from profiles.encodings import FOUR_BIT_VALUES, NESTED_RUN, NESTED_VALUES

SCALES = ("F16", "BF16", "F32")
FP8_SCALES = (*SCALES, "F8_E8M0", "U8")


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
