"""Encoded matrices: unpacking, and products with few rows.

``profiles.encodings`` says how elements are stored. On the CPU native kernels read them where they
are, and on a GPU those in Triton. Elsewhere the twins in plain torch unpack them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from types import ModuleType

import torch

from profiles.kernels.call import call_kernel, gpu_kernels, is_native, pointer
from profiles.kernels.encoded_matrix import EncodedMatrix
from profiles.kernels.encoded_twins import unpack_encoded_twin
from profiles.kernels.products import Products, linear, most_native_rows, multiplies_tiles
from profiles.kernels.row_tiles import TILE_OUTPUTS
from profiles.packing import DECODED_AT_ONCE_BYTES, DIRECT_ROWS

_SCALES = ("float32", "float16", "bfloat16", "code")
# Elements that share a scale are 2^so many where a whole row does.
_WHOLE_ROW = 62
# The twins' temporaries are some ten times as large as the rows that are unpacked at once.
_TWIN_ELEMENTS = 2**19


class _Encoding(ctypes.Structure):
    """An encoding of rows, as ``encodings.h`` lays it out."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("scale", ctypes.c_int),
        ("has_zeros", ctypes.c_int),
        ("dim", ctypes.c_long),
        ("code_bytes", ctypes.c_long),
        ("group_shift", ctypes.c_long),
        ("num_groups", ctypes.c_long),
        ("tile_rows", ctypes.c_long),
        ("tile_shift", ctypes.c_long),
        ("tile_scales", ctypes.c_long),
    )


class _EncodedProducts(ctypes.Structure):
    """The arguments of a product, as ``encodings.h`` lays them out."""

    _fields_ = (
        ("products", Products),
        ("how", _Encoding),
        ("tables", ctypes.c_void_p),
        ("first_rows", ctypes.c_void_p),
    )


def unpack_encoded(matrix: EncodedMatrix, out: torch.Tensor) -> None:
    """Unpack a matrix into ``out`` [outputs, num_elements], dense in its last dimension.

    Elements are computed in float32 and rounded once to the dtype of ``out``: float32, bfloat16 or
    float16.
    """
    assert out.shape == (len(matrix.rows), matrix.num_elements) and out.stride(1) == 1
    if matrix.columns is not None:
        stored = torch.empty_like(out)
        unpack_encoded(replace(matrix, columns=None), stored)
        out.index_copy_(1, matrix.columns.long(), stored)
    elif is_native(out):
        how = _described(matrix)
        table = None if matrix.table is None else pointer(matrix.table)
        call_kernel(
            "unpack_encoded",
            out.dtype,
            ctypes.byref(how),
            pointer(matrix.rows),
            ctypes.c_long(len(out)),
            ctypes.c_long(matrix.rows.stride(0)),
            ctypes.c_long(matrix.first_row),
            table,
            pointer(out),
            ctypes.c_long(out.stride(0)),
        )
    elif fused := _fused(out):
        fused.unpack_encoded(matrix, out)
    else:
        step = max(1, _TWIN_ELEMENTS // matrix.num_elements)
        for part, rows in zip(_parts(matrix, step), out.split(step), strict=True):
            rows.copy_(
                unpack_encoded_twin(
                    part.rows, part.encoding, part.num_elements, part.table, part.first_row
                )
            )


def multiply_encoded(
    x: torch.Tensor,
    matrix: EncodedMatrix,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    adds: bool = False,
) -> None:
    """Multiply ``x`` [rows, num_elements] by a matrix into ``out`` [rows, outputs].

    The result is that of the matrix unpacked to the dtype of ``x``. Few rows are multiplied by the
    encoded matrix as it is; for more, some of its rows at a time are unpacked. With AVX-512 VNNI or
    AVX2, bfloat16 inputs and blocks of GGUF are multiplied as integers. Weights are then exact.
    Inputs are rounded to 2^-14 of the largest of each 64; those that are not finite make results
    NaN.

    Parameters
    ----------
    bias
        [outputs]; added before rounding.
    adds
        Whether the rounded product is added to the values in ``out``.
    """
    assert out.shape == (len(x), len(matrix.rows)) and out.stride(1) == 1
    if matrix.columns is not None:
        x, matrix = x[:, matrix.columns], replace(matrix, columns=None)
    is_few = len(x) <= most_native_rows(x.dtype)
    if is_native(x) and is_few and not multiplies_tiles(x):
        _multiply(x, [len(x)], [matrix], out, biases=bias if bias is None else [bias], adds=adds)
    elif len(x) <= DIRECT_ROWS and (fused := _fused(x)):
        fused.multiply_encoded(x, matrix, out, bias, adds=adds)
    else:
        _multiply_unpacked(x, matrix, out, bias, adds=adds)


def grouped_encoded(
    x: torch.Tensor,
    counts: Sequence[int],
    matrices: Sequence[EncodedMatrix],
    out: torch.Tensor,
    biases: Sequence[torch.Tensor] | None = None,
) -> None:
    """Multiply each group of rows by its own matrix into ``out`` [rows, outputs].

    Groups are adjacent and in order; ``counts`` has the rows of each. All matrices have the same
    encoding and the same shape.

    Parameters
    ----------
    biases
        The bias of each group, [outputs] in the dtype of ``x``; added before rounding.
    """
    assert len(counts) == len(matrices) > 0 and sum(counts) == len(x) == len(out)
    assert biases is None or len(biases) == len(counts)
    is_in_order = all(matrix.columns is None for matrix in matrices)
    if is_native(x) and is_in_order and not multiplies_tiles(x):
        _multiply(x, counts, matrices, out, biases=biases)
        return
    if is_in_order and len(x) <= DIRECT_ROWS * len(counts) and (fused := _fused(x)):
        fused.grouped_encoded(x, counts, matrices, out, biases)
        return
    parts = zip(x.split(list(counts)), matrices, out.split(list(counts)), strict=True)
    for group, (rows, matrix, to) in enumerate(parts):
        if len(rows):
            multiply_encoded(rows, matrix, to, biases[group] if biases else None)


def _fused(tensor: torch.Tensor) -> ModuleType | None:
    """Return the kernels for a tensor on a GPU, where there are any."""
    return gpu_kernels() if tensor.is_cuda else None


def _parts(matrix: EncodedMatrix, step: int) -> Iterator[EncodedMatrix]:
    for first in range(0, len(matrix.rows), step):
        yield matrix.part(first, first + step)


def _multiply_unpacked(
    x: torch.Tensor,
    matrix: EncodedMatrix,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    adds: bool,
) -> None:
    """Unpack some rows of the matrix at a time, and multiply with torch's own product."""
    row_bytes = matrix.num_elements * x.element_size()
    step = TILE_OUTPUTS if multiplies_tiles(x) else max(1, DECODED_AT_ONCE_BYTES // row_bytes)
    weight = x.new_empty(min(step, len(matrix.rows)), matrix.num_elements)
    for number, part in enumerate(_parts(matrix, step)):
        here = slice(number * step, number * step + len(part.rows))
        unpack_encoded(part, weight[: len(part.rows)])
        own_bias = None if bias is None else bias[here]
        linear(x, weight[: len(part.rows)], own_bias, out[:, here], adds=adds)


def _described(matrix: EncodedMatrix) -> _Encoding:
    how, width = matrix.encoding, matrix.num_elements
    return _Encoding(
        kind=int(how.kind),
        scale=_SCALES.index(how.scale) if how.scale else 0,
        has_zeros=bool(how.zero_bits),
        dim=width,
        code_bytes=how.code_bytes(width),
        group_shift=how.group_elements.bit_length() - 1 if how.group_elements else _WHOLE_ROW,
        num_groups=how.num_groups(width),
        tile_rows=how.tile_rows,
        tile_shift=how.tile_columns.bit_length() - 1 if how.tile_columns else _WHOLE_ROW,
        tile_scales=how.tile_scales(width),
    )


def _multiply(
    x: torch.Tensor,
    counts: Sequence[int],
    matrices: Sequence[EncodedMatrix],
    out: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor] | None = None,
    adds: bool = False,
) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    first = matrices[0]
    assert x.shape[1] == first.num_elements and out.dtype == x.dtype and out.stride(1) == 1
    assert all(m.encoding == first.encoding and m.rows.shape == first.rows.shape for m in matrices)
    assert all(m.rows.stride() == first.rows.stride() for m in matrices)
    assert all(bias.dtype == x.dtype and bias.stride(0) == 1 for bias in biases or ())
    # Named, because they must outlive the call.
    starts = (ctypes.c_long * (len(counts) + 1))(0, *accumulate(counts))
    addresses = (ctypes.c_void_p * len(matrices))(*(m.rows.data_ptr() for m in matrices))
    tables = [m.table.data_ptr() for m in matrices if m.table is not None]
    table_addresses = (ctypes.c_void_p * len(tables))(*tables)
    first_rows = (ctypes.c_long * len(matrices))(*(m.first_row for m in matrices))
    added = biases and (ctypes.c_void_p * len(biases))(*(bias.data_ptr() for bias in biases))
    products = Products(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weights=ctypes.addressof(addresses),
        biases=ctypes.addressof(added) if added else None,
        starts=ctypes.addressof(starts),
        groups=len(counts),
        outputs=len(first.rows),
        dim=first.num_elements,
        weight_stride=first.rows.stride(0),
        # Not 0: the rows are no plain elements.
        bits=8,
        group_size=first.num_elements,
        out=out.data_ptr(),
        out_stride=out.stride(0),
        adds=adds,
    )
    arguments = _EncodedProducts(
        products=products,
        how=_described(first),
        tables=ctypes.addressof(table_addresses) if tables else None,
        first_rows=ctypes.addressof(first_rows),
    )
    call_kernel("multiply_encoded", x.dtype, ctypes.byref(arguments))
