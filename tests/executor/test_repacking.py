"""Quantized tensors as shipped have, as encoded rows, the values that their formulas give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations import finegrained_fp8, mxfp4

from costmodel.model.quantized import read_quantized
from executor.checkpoint import repacking
from executor.checkpoint.quantized_layouts import Matrix
from executor.checkpoint.quantized_tensors import find_rows
from executor.checkpoint.stored_tensors import SINGLE_NAME, StoredTensors
from profiles.encodings import BLOCK_ENCODINGS
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix, multiply_encoded, unpack_encoded

RANDOM = np.random.default_rng(0)


def _words(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.integers(-(2**31), 2**31, shape, dtype=np.int64)).int()


def _scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(RANDOM.normal(size=shape)).to(dtype)


def _code(words: torch.Tensor, at: int, place: int, other: int, bits: int) -> int:
    """Return a code by its place along the last dimension, in arithmetic of Python's integers."""
    per = 32 // bits
    word = int(words[at, place // per]) & 0xFFFFFFFF
    shift = bits * (other if other >= 0 else place % per)
    return (word >> shift) % (1 << bits)


def _values(matrix: EncodedMatrix) -> torch.Tensor:
    out = torch.empty(len(matrix.rows), matrix.num_elements)
    unpack_encoded(matrix, out)
    return out


def _stored(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], *shape: int
) -> EncodedMatrix:
    """Store a matrix of a module in a file, and read it from there."""
    tensors = {f"x.{end}": tensor.contiguous() for end, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE_NAME)
    how = read_quantized({"quantization_config": config}, "float32")
    assert how is not None
    outputs, inputs = shape
    matrix = Matrix(outputs=outputs, inputs=inputs, how=how)
    reader = find_rows(StoredTensors.open(folder, "model."), "x.weight", matrix)
    assert reader is not None
    rows = torch.empty(outputs, how.encoding.row_bytes(inputs), dtype=torch.uint8)
    reader.read(0, rows)
    table = reader.table()
    return EncodedMatrix(rows=rows, encoding=how.encoding, num_elements=inputs, table=table)


def _fp8(
    folder: Path, weight: torch.Tensor, scale: torch.Tensor, tile: list[int] | None
) -> EncodedMatrix:
    config = {"quant_method": "fp8", "weight_block_size": tile}
    tensors = {"weight": weight, "weight_scale_inv": scale}
    return _stored(folder, config, tensors, *weight.shape)


def _has_size_of(matrix: EncodedMatrix, *shipped: torch.Tensor | None) -> None:
    """The rows and their table take what the tensors do, and less than 1 % more."""
    table = 0 if matrix.table is None else matrix.table.nbytes
    assert matrix.rows.nbytes + table <= 1.01 * sum(t.nbytes for t in shipped if t is not None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_v1", [True, False])
@pytest.mark.parametrize(
    ("group_size", "is_ordered"), [(64, True), (64, False), (128, True), (-1, True)]
)
def test_gptq(bits: int, is_v1: bool, group_size: int, is_ordered: bool) -> None:
    inputs, outputs, per = 384, 24, 32 // bits
    size = inputs if group_size < 0 else group_size
    groups = inputs // size
    qweight, qzeros = _words(inputs // per, outputs), _words(groups, outputs // per)
    scales = _scales(groups, outputs)
    g_idx = torch.arange(inputs, dtype=torch.int32) // size
    if not is_ordered:
        g_idx = g_idx[torch.randperm(inputs)]
    matrix = repacking.from_gptq(
        qweight, qzeros, scales, g_idx, bits=bits, group_size=group_size, is_v1=is_v1
    )
    assert (matrix.columns is None) == is_ordered
    expected = np.empty((outputs, inputs), dtype=np.float32)
    for o in range(outputs):
        for i in range(inputs):
            g = int(g_idx[i])
            zero = _code(qzeros, g, o, -1, bits)
            zero = (zero + is_v1) % 2**bits
            code = _code(qweight.t(), o, i, -1, bits)
            expected[o, i] = np.float32(scales[g, o].item()) * np.float32(code - zero)
    assert torch.equal(_values(matrix), torch.from_numpy(expected))
    _has_size_of(matrix, qweight, qzeros, scales)
    x, out = torch.randn(3, inputs), torch.empty(3, outputs)
    multiply_encoded(x, matrix, out)
    torch.testing.assert_close(out, x @ torch.from_numpy(expected).T, rtol=1e-5, atol=1e-2)


def test_awq() -> None:
    inputs, outputs, group = 256, 32, 64
    qweight, qzeros = _words(inputs, outputs // 8), _words(inputs // group, outputs // 8)
    scales = _scales(inputs // group, outputs)
    matrix = repacking.from_awq(qweight, qzeros, scales, group_size=group)
    # Place i of a word has the output order[i] of its eight.
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = np.empty((outputs, inputs), dtype=np.float32)
    for o in range(outputs):
        place = order.index(o % 8)
        for i in range(inputs):
            code = _code(qweight, i, o, place, 4) - _code(qzeros, i // group, o, place, 4)
            expected[o, i] = np.float32(scales[i // group, o].item()) * np.float32(code)
    assert torch.equal(_values(matrix), torch.from_numpy(expected))
    _has_size_of(matrix, qweight, qzeros, scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "inputs"), [(32, 96), (128, 256), (-1, 100)])
def test_compressed_tensors(bits: int, is_symmetric: bool, group_size: int, inputs: int) -> None:
    outputs, per, half = 20, 32 // bits, 2 ** (bits - 1)
    size = inputs if group_size < 0 else group_size
    packed = _words(outputs, -(-inputs // per))
    scale = _scales(outputs, -(-inputs // size), dtype=torch.bfloat16)
    zero_point = None if is_symmetric else _words(-(-outputs // per), scale.shape[1])
    matrix = repacking.from_compressed(
        packed, scale, zero_point, None, bits=bits, group_size=group_size, num_inputs=inputs
    )
    expected = np.empty((outputs, inputs), dtype=np.float32)
    for o in range(outputs):
        for i in range(inputs):
            code, zero = _code(packed, o, i, -1, bits) - half, 0
            if zero_point is not None:
                zero = _code(zero_point.t(), i // size, o, -1, bits) - half
            expected[o, i] = np.float32(scale[o, i // size].item()) * np.float32(code - zero)
    assert torch.equal(_values(matrix), torch.from_numpy(expected))
    if inputs % 32 == 0:
        _has_size_of(matrix, packed, scale, zero_point)


def test_compressed_tensors_in_another_order() -> None:
    packed, scale = _words(4, 16), _scales(4, 4)
    order = torch.randperm(128)
    g_idx = (torch.arange(128) // 32)[order].int()
    matrix = repacking.from_compressed(
        packed, scale, None, g_idx, bits=4, group_size=32, num_inputs=128
    )
    codes = torch.tensor([[_code(packed, o, i, -1, 4) - 8 for i in range(128)] for o in range(4)])
    assert torch.equal(_values(matrix), codes.float() * scale.float()[:, g_idx.long()])


def test_int8_and_fp8_with_scales_of_outputs(tmp_path: Path) -> None:
    codes = torch.from_numpy(RANDOM.integers(-128, 128, (12, 77), dtype=np.int8))
    scale = _scales(12, 1, dtype=torch.bfloat16)
    matrix = repacking.from_int8(codes, scale)
    assert torch.equal(_values(matrix), codes.float() * scale.float())
    floats = torch.randn(12, 77).to(torch.float8_e4m3fn)
    matrix = _fp8(tmp_path, floats, scale, None)
    assert torch.equal(_values(matrix), floats.float() * scale.float())
    for one in (scale[0], scale[0, 0]):
        matrix = _fp8(tmp_path, floats, one, None)
        assert torch.equal(_values(matrix), floats.float() * scale[0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_fp8_in_tiles(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = (torch.randn(256, 384) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.5
    scale = (scale * 3 + 125).to(dtype) if dtype == torch.uint8 else scale.to(dtype)
    matrix = _fp8(tmp_path, weight, scale, [128, 128])
    dequantize: Any = finegrained_fp8.Fp8Dequantize(None)
    expected = dequantize._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(_values(matrix), expected)
    _has_size_of(matrix, weight, scale)
    # Tiles that end within both sides.
    part = _fp8(tmp_path, weight[:200, :300], scale, [128, 128])
    assert torch.equal(_values(part), expected[:200, :300])
    # A matrix with one tile has one scale for all of its rows.
    small = _fp8(tmp_path, weight[:100, :64], scale[:1, :1], [128, 128])
    assert small.table is not None and len(small.table) == 1
    assert torch.equal(_values(small), expected[:100, :64])


def test_mxfp4_of_experts() -> None:
    blocks = torch.from_numpy(RANDOM.integers(0, 256, (3, 10, 4, 16), dtype=np.uint8))
    scales = torch.from_numpy(RANDOM.integers(0, 255, (3, 10, 4), dtype=np.uint8))
    rows = repacking.from_mxfp4(blocks, scales)
    assert rows.nbytes == blocks.nbytes + scales.nbytes
    # It transposes each expert.
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for expert in range(3):
        matrix = EncodedMatrix(
            rows=rows[expert], encoding=BLOCK_ENCODINGS["MXFP4"], num_elements=128
        )
        assert torch.equal(_values(matrix), expected[expert].t())


@pytest.mark.parametrize("is_nested", [True, False])
def test_bitsandbytes_in_4_bits(is_nested: bool, tmp_path: Path) -> None:
    outputs, inputs, size = 70, 320, 64
    weight = torch.from_numpy(RANDOM.integers(0, 256, (outputs * inputs // 2, 1), dtype=np.uint8))
    blocks = outputs * inputs // size
    quant_map = _scales(16, dtype=torch.float32)
    absmax = _scales(blocks, dtype=torch.float32).abs()
    scales = absmax.numpy()
    state: dict[str, Any] = {"blocksize": size, "shape": [outputs, inputs]}
    nested = {}
    if is_nested:
        absmax = torch.from_numpy(RANDOM.integers(0, 256, blocks, dtype=np.uint8))
        factors = _scales(-(-blocks // 256), dtype=torch.float32)
        meanings = _scales(256, dtype=torch.float32)
        nested = {"weight.nested_absmax": factors, "weight.nested_quant_map": meanings}
        state |= {"nested_blocksize": 256, "nested_offset": 0.125}
        scales = meanings.numpy()[absmax.numpy()] * factors.numpy().repeat(256)[:blocks]
        scales = scales + np.float32(0.125)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {
        "weight": weight,
        "weight.absmax": absmax,
        "weight.quant_map": quant_map,
        "weight.quant_state.bitsandbytes__nf4": text,
    }
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": is_nested,
    }
    matrix = _stored(tmp_path, config, tensors | nested, outputs, inputs)
    flat = weight.flatten().numpy()
    codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)
    expected = quant_map.numpy()[codes] * scales.repeat(size)
    assert torch.equal(_values(matrix), torch.from_numpy(expected).view(outputs, inputs))
    extra = (quant_map, *nested.values(), torch.zeros(1 if is_nested else 0))
    _has_size_of(matrix, weight, absmax, *extra)


def test_bitsandbytes_in_8_bits() -> None:
    weight = torch.from_numpy(RANDOM.integers(-128, 128, (9, 50), dtype=np.int8))
    largest = torch.rand(9) * 3
    matrix = repacking.from_bnb8(weight, largest)
    assert torch.equal(_values(matrix), weight * largest.view(-1, 1) * 7.874015718698502e-3)
    _has_size_of(matrix, weight, largest)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    words, zeros, scales = _words(8, 8), _words(1, 1), _scales(1, 8)
    how: Any = {"bits": 4, "group_size": 64, "is_v1": True}
    repacking.from_gptq(words, zeros, scales, None, **how)
    for wrong in (
        (words.long(), zeros, scales, None),
        (words, zeros, scales[:, :7], None),
        (words, _words(2, 1), scales, None),
        (words, zeros, scales * torch.nan, None),
        (_words(16, 8), _words(2, 1), _scales(2, 8), torch.zeros(128, dtype=torch.int32)),
    ):
        with pytest.raises(InputError):
            repacking.from_gptq(*wrong, **how)
    fp8 = torch.zeros(130, 128).to(torch.float8_e4m3fn)
    for scale in (torch.ones(1, 1), torch.full((2, 1), torch.inf)):
        with pytest.raises(InputError):
            _fp8(tmp_path, fp8, scale, [128, 128])
    blocks = torch.zeros(2, 3, 16, dtype=torch.uint8)
    for exponents in (torch.zeros(2, 2), torch.full((2, 3), 255)):
        with pytest.raises(InputError):
            repacking.from_mxfp4(blocks, exponents.to(torch.uint8))
    with pytest.raises(InputError):
        repacking.from_bnb4(
            torch.zeros(48, 1, dtype=torch.uint8),
            torch.ones(2),
            shape=(2, 48),
            block_size=64,
        )
