"""Encoded matrices have the values of the formats' own readers, and products of these values."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from profiles.encodings import (
    BLOCK_ENCODINGS,
    Encoding,
    Kind,
    find_encoding,
    four_bit_floats,
    fp8,
    integers,
)
from profiles.errors import InputError
from profiles.kernels import (
    EncodedMatrix,
    build,
    grouped_encoded,
    multiply_encoded,
    products,
    unpack_encoded,
)
from profiles.kernels.call import has_integer_products
from tests.profiles.encoded_matrices import (
    CASES,
    IDS,
    OTHERS,
    all_matrices,
    reference,
    sound_matrix,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
DTYPES = tuple(TOLERANCE)
MULTIPLIED_AS_INTEGERS = [name for name, e in BLOCK_ENCODINGS.items() if not e.is_plain]


def _unpacked(matrix: EncodedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Unpack into a matrix whose rows lie apart; nothing beside it is written."""
    around = torch.full((len(matrix.rows), matrix.num_elements + 5), 7.0, dtype=dtype)
    out = around[:, 2:-3]
    unpack_encoded(matrix, out)
    assert (around[:, :2] == 7).all() and (around[:, -3:] == 7).all()
    return out


@pytest.mark.parametrize(("encoding", "width"), CASES, ids=IDS)
def test_values_are_those_of_the_format(library: str, encoding: Encoding, width: int) -> None:
    for matrix in all_matrices(encoding, width):
        expected = reference(matrix)
        for dtype in DTYPES:
            found = _unpacked(matrix, dtype)
            torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BLOCK_ENCODINGS)
def test_values_are_those_of_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    encoding, number = BLOCK_ENCODINGS[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[number] == (encoding.block_elements, encoding.block_bytes)
    for matrix in all_matrices(encoding, 2 * encoding.block_elements):
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(matrix.rows.numpy(), number)
        np.testing.assert_array_equal(_unpacked(matrix, torch.float32).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("encoding", "width"), CASES, ids=IDS)
def test_products_are_those_of_the_values(
    library: str, encoding: Encoding, width: int, dtype: torch.dtype
) -> None:
    outputs, rtol = 139, TOLERANCE[dtype]
    matrix = sound_matrix(encoding, outputs, width)
    values = _unpacked(matrix, dtype).double()
    # Rows differ in size by far. This is the standard deviation of each one's products.
    sizes = values.norm(dim=1)
    generator = torch.Generator().manual_seed(width)

    def check(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert ((found.double() - expected).abs() <= rtol * (sizes + expected.abs())).all()

    bias = torch.randn(outputs, generator=generator).to(dtype)
    for rows in (1, 2, 7, 70):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        expected = x.double() @ values.T
        around = torch.full((rows, outputs + 3), torch.nan, dtype=dtype)
        out = around[:, 1:-2]
        multiply_encoded(x, matrix, out, bias)
        check(out, expected + bias.double())
        before = out.double()
        multiply_encoded(x, matrix, out, adds=True)
        check(out, before + expected.to(dtype).double())
        assert around.isnan().sum() == 3 * rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("encoding", "width"),
    [
        (BLOCK_ENCODINGS["Q4_K"], 1280),
        (fp8(128, 128), 300),
        (four_bit_floats(64, is_nested=True), 128),
    ],
    ids=["Q4_K", "E4M3", "MAP4"],
)
def test_groups_are_multiplied_by_their_own_matrices(
    library: str, encoding: Encoding, width: int, dtype: torch.dtype
) -> None:
    counts = [3, 0, 1, 1, 17]
    matrices = [sound_matrix(encoding, 200, width, seed) for seed in range(len(counts))]
    x = torch.randn(sum(counts), width).to(dtype)
    out = torch.empty(len(x), 200, dtype=dtype)
    grouped_encoded(x, counts, matrices, out)
    expected = torch.cat(
        [
            rows.double() @ _unpacked(matrix, dtype).double().T
            for rows, matrix in zip(x.split(counts), matrices, strict=True)
        ]
    )
    atol = TOLERANCE[dtype] * expected.std().item()
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=atol)
    biases = list(torch.randn(len(counts), 200).to(dtype))
    added = torch.stack(biases).double().repeat_interleave(torch.tensor(counts), 0)
    grouped_encoded(x, counts, matrices, out, biases)
    torch.testing.assert_close(out.double(), expected + added, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize(("encoding", "width"), OTHERS, ids=IDS[-len(OTHERS) :])
def test_a_part_has_the_values_that_the_whole_has(
    library: str, encoding: Encoding, width: int
) -> None:
    matrix = sound_matrix(encoding, 300, width)
    part = matrix.part(131, 290)
    assert torch.equal(_unpacked(part, torch.float32), _unpacked(matrix, torch.float32)[131:290])
    x = torch.randn(2, width)
    whole, out = torch.empty(2, 300), torch.empty(2, 159)
    multiply_encoded(x, matrix, whole)
    multiply_encoded(x, part, out)
    # Sums may be in another order; the largest term sets how much that changes.
    atol = 2e-6 * whole.abs().max().item()
    torch.testing.assert_close(out, whole[:, 131:290], rtol=1.3e-6, atol=atol)


def test_slices_are_views_and_clones_are_not(library: str) -> None:
    matrix = sound_matrix(fp8(128, 128), 300, 200)
    part = matrix[131:290]
    assert matrix.shape == (300, 200) and part.shape == (159, 200) and matrix[290:].shape[0] == 10
    assert matrix[300:].shape == matrix[5:3].shape == (0, 200)
    assert part.rows.data_ptr() == matrix.rows[131].data_ptr() and part.table is matrix.table
    copy, expected = part.clone(), _unpacked(matrix, torch.float32)[131:290]
    matrix.rows.zero_()
    assert matrix.table is not None
    matrix.table.zero_()
    assert torch.equal(_unpacked(copy, torch.float32), expected)


def test_columns_may_be_stored_in_another_order(library: str) -> None:
    matrix = sound_matrix(integers(4, 32, "float16", has_zeros=True), 20, 96)
    order = torch.randperm(96)
    moved = EncodedMatrix(
        rows=matrix.rows, encoding=matrix.encoding, num_elements=96, columns=order
    )
    plain = _unpacked(matrix, torch.float32)
    assert torch.equal(_unpacked(moved, torch.float32)[:, order], plain)
    x, out = torch.randn(3, 96), torch.empty(3, 20)
    expected = x[:, order] @ plain.T
    multiply_encoded(x, moved, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    grouped_encoded(x, [1, 2], [moved, moved], out.zero_())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    biases = list(torch.randn(2, 20))
    grouped_encoded(x, [1, 2], [moved, moved], out.zero_(), biases)
    expected += torch.stack([biases[0], biases[1], biases[1]])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "width"), [("Q4_K", 512), ("Q4_1", 352)])
def test_what_is_not_finite_stays_in_its_output(
    library: str, name: str, width: int, dtype: torch.dtype
) -> None:
    encoding = BLOCK_ENCODINGS[name]
    matrix = sound_matrix(encoding, 9, width)
    at = encoding.block_bytes
    matrix.rows[7, at : at + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    x, out = torch.randn(3, width).to(dtype), torch.empty(3, 9, dtype=dtype)
    x[2, 300] = torch.inf
    multiply_encoded(x, matrix, out)
    assert out[:, 7].isnan().all() and not out[2].isfinite().any()
    out[:, 7] = 0
    assert out[:2].isfinite().all()


@pytest.mark.parametrize("name", MULTIPLIED_AS_INTEGERS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_in_integers_round_next_to_nothing(library: str, name: str, rows: int) -> None:
    """Inputs lose 2^-14 of the largest of each 64 at most, and weights nothing."""
    encoding = BLOCK_ENCODINGS[name]
    # Blocks of 32 may end within what is multiplied together.
    width = 1024 + (3 * 32 if encoding.block_elements == 32 else 0)
    matrix = sound_matrix(encoding, 50, width)
    x = torch.randn(rows, width)
    x[:, ::64] *= 1000
    x[0, 64:128] = 0
    x[-1, 128:192] *= 1e-30
    inputs, out = x.bfloat16(), torch.empty(rows, 50, dtype=torch.bfloat16)
    multiply_encoded(inputs, matrix, out)
    values, exact = reference(matrix).double(), inputs.double()
    expected = exact @ values.T
    scaled = torch.nn.functional.pad(exact.abs(), (0, -width % 64)).view(rows, -1, 64)
    lost = scaled.amax(2).repeat_interleave(64, 1)[:, :width] * 2**-14
    is_few = rows <= products.most_native_rows(torch.bfloat16)
    if library == "twin" or not is_few or not has_integer_products():
        # Products of floats, with weights in bfloat16.
        lost = exact.abs() * 2**-8
    most = (lost + exact.abs() * 2**-20) @ values.abs().T + expected.abs() * 2**-8
    assert ((out.double() - expected).abs() <= most).all()


@pytest.mark.parametrize("name", MULTIPLIED_AS_INTEGERS)
@pytest.mark.parametrize("byte", [0x00, 0x80, 0xFF])
def test_extreme_codes_and_inputs_do_not_overflow(library: str, name: str, byte: int) -> None:
    encoding = BLOCK_ENCODINGS[name]
    blocks = torch.full((2, 256 // encoding.block_elements, encoding.block_bytes), byte)
    blocks = blocks.to(torch.uint8)
    if name == "Q6_K":
        # Codes of -32 with scales of -128.
        blocks[..., :192] = 0
    if name == "MXFP4":
        blocks[..., 0] = 127
    for at in encoding.halves_at:
        blocks[..., at : at + 2] = torch.tensor([0, 60])
    matrix = EncodedMatrix(rows=blocks.flatten(1), encoding=encoding, num_elements=256)
    values = reference(matrix)
    x = torch.tensor([[1.9921875], [-1.9921875]]).expand(2, 256).bfloat16()
    for rows in (1, 2):
        out = torch.empty(rows, 2, dtype=torch.bfloat16)
        multiply_encoded(x[:rows], matrix, out)
        expected = x[:rows].double() @ values.double().T
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


def test_encodings_have_names_and_sizes() -> None:
    for encoding, width in CASES:
        assert find_encoding(encoding.name) == encoding
        assert encoding.row_bytes(width) >= encoding.code_bytes(width)
    assert BLOCK_ENCODINGS["Q4_K"].row_bytes(4096) == 4096 * 9 // 16
    assert integers(4, 128, "float16", has_zeros=True).row_bytes(4096) == 2048 + 64 + 16
    nested, tiles = four_bit_floats(64, is_nested=True), fp8(128, 128)
    assert (nested.row_bytes(4096), nested.table_elements(8, 4096)) == (2048 + 64, 275)
    assert (tiles.row_bytes(300), tiles.table_elements(200, 300)) == (300, 6)
    assert not BLOCK_ENCODINGS["Q4_K"].fits(4096 + 32) and fp8(1, 0).fits(77)
    for name in ("Q9_9", "INT4_G48_F16", "E4M3_128X100", "INT3_G32_F16", "MAP4_G16"):
        with pytest.raises(InputError):
            find_encoding(name)


def test_the_kernels_know_all_kinds() -> None:
    source = (build.FOLDER / "encoded_product.h").read_text(encoding="utf-8")
    table = source.partition("#define FOR_ENCODINGS(DO)")[2].partition("\n\n")[0]
    assert re.findall(r"DO\((\w+)\)", table) == [kind.name for kind in Kind]
