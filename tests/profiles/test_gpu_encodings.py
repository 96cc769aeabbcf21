"""Encoded matrices in Triton, against their twins: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from profiles.compute_plan import DTYPES
from profiles.encodings import BLOCK_ENCODINGS, BNB_INT8, Encoding, four_bit_floats, fp8, integers
from profiles.kernels import EncodedMatrix, grouped_encoded, multiply_encoded, unpack_encoded
from profiles.kernels.encoded_twins import unpack_encoded_twin
from tests.covering import covering
from tests.profiles.encoded_matrices import OTHERS, all_matrices, sound_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 as if its bits were whole numbers.
MULTIPLIED = [d for d in DTYPES.values() if DEVICE == "cuda" or d != torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [*((how, 3 * how.block_elements) for how in BLOCK_ENCODINGS.values()), *OTHERS]
IDS = [f"{encoding.name}-{width}" for encoding, width in CASES]
# One of each form, with a last unit that is whole and one that is not.
FORMS = [
    (BLOCK_ENCODINGS["Q6_K"], 768),
    (fp8(128, 128), 300),
    (integers(4, 64, "bfloat16", has_zeros=True), 120),
]
# The interpreter's arithmetic is numpy's, which warns of what is not finite.
pytestmark = [
    pytest.mark.gpu_kernels,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def gpu(quick_interpreter: None) -> Iterator[ModuleType]:
    """The kernels, imported only where they are wanted.

    In the interpreter they have large programs, because its time is that of the steps.
    """
    kernels = importlib.import_module("profiles.kernels.gpu")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr("profiles.kernels.gpu.encoded.PROGRAM_UNITS", 4096)
            patch.setattr("profiles.kernels.gpu.encoded_products.DEPTH_BYTES", 1024)
        yield kernels


@pytest.fixture
def public(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the functions of ``profiles.kernels`` call these kernels on any device."""
    monkeypatch.setattr("profiles.kernels.encoded.is_native", lambda _: False)
    monkeypatch.setattr("profiles.kernels.encoded._fused", lambda _: gpu)


def _values(matrix: EncodedMatrix) -> torch.Tensor:
    return unpack_encoded_twin(
        matrix.rows, matrix.encoding, matrix.num_elements, matrix.table, matrix.first_row
    )


def _apart(matrix: EncodedMatrix) -> EncodedMatrix:
    """Return the matrix with rows that are apart, at odd addresses."""
    num_rows, row_bytes = matrix.rows.shape
    around = torch.full((num_rows, row_bytes + 5), 0xAA, dtype=torch.uint8, device=DEVICE)
    table = None if matrix.table is None else matrix.table.to(DEVICE)
    return replace(matrix, rows=around[:, 1:-4].copy_(matrix.rows), table=table)


def _unpacked(matrix: EncodedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Unpack into a matrix whose rows are apart; nothing beside it is written."""
    shape = len(matrix.rows), matrix.num_elements + 5
    around = torch.full(shape, 7.0, dtype=dtype, device=DEVICE)
    unpack_encoded(matrix, around[:, 2:-3])
    assert (around[:, :2] == 7).all() and (around[:, -3:] == 7).all()
    return around[:, 2:-3]


@pytest.mark.parametrize(("encoding", "width"), CASES, ids=IDS)
def test_values_are_those_of_the_twins(public: None, encoding: Encoding, width: int) -> None:
    for matrix in map(_apart, all_matrices(encoding, width)):
        found = _unpacked(matrix, torch.float32)
        torch.testing.assert_close(found, _values(matrix), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("encoding", "width"), FORMS)
def test_rows_of_many_programs(
    public: None, monkeypatch: pytest.MonkeyPatch, encoding: Encoding, width: int
) -> None:
    """Whatever the dtype, and of a part of the matrix."""
    monkeypatch.setattr("profiles.kernels.gpu.encoded.PROGRAM_UNITS", 16)
    part = _apart(sound_matrix(encoding, 140, width)).part(126, 131)
    for dtype in DTYPES.values():
        # The interpreter cuts off what a GPU rounds to bfloat16.
        is_cut = DEVICE == "cpu" and dtype == torch.bfloat16
        rtol = 2**-7 if is_cut else 0.0
        torch.testing.assert_close(
            _unpacked(part, dtype), _values(part).to(dtype), rtol=rtol, atol=0
        )


@pytest.mark.parametrize(("encoding", "width"), CASES, ids=IDS)
def test_products_are_those_of_the_values(public: None, encoding: Encoding, width: int) -> None:
    """Of a part of the matrix; nothing beside the result is written."""
    part = _apart(sound_matrix(encoding, 33, width)).part(1, 32)
    x = torch.randn(3, width + 1, device=DEVICE)[:, :-1]
    expected = x.double() @ _values(part).double().T
    around = torch.full((3, 34), torch.nan, device=DEVICE)
    out = around[:, 1:-2]
    multiply_encoded(x, part, out)
    atol = 1e-5 * expected.std().item()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=atol)
    assert around.isnan().sum() == 9


@covering({"dtype": MULTIPLIED, "encoding, width": FORMS, "num_rows": [1, 17, 65]})
def test_products_are_biased_and_added(
    public: None, encoding: Encoding, width: int, dtype: torch.dtype, num_rows: int
) -> None:
    """In tiles of few rows, in those of many, and in torch."""
    rtol, outputs = TOLERANCE[dtype], 67
    matrix = _apart(sound_matrix(encoding, outputs, width))
    x = torch.randn(num_rows, width, device=DEVICE).to(dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype)
    out = torch.randn(num_rows, outputs, device=DEVICE).to(dtype)
    product = x.double() @ _values(matrix).to(dtype).double().T + bias.double()
    expected, atol = product + out.double(), 2 * rtol * product.std().item()
    multiply_encoded(x, matrix, out, bias, adds=True)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


@covering(
    {
        "dtype": MULTIPLIED,
        "encoding, width": [*FORMS[:2], (four_bit_floats(64, is_nested=True), 128)],
        "counts": [[3, 0, 1, 17, 0], [0, 70]],
    }
)
def test_groups_are_multiplied_by_their_own_matrices(
    public: None, encoding: Encoding, width: int, dtype: torch.dtype, counts: list[int]
) -> None:
    """In tiles of few rows, and in those of many."""
    rtol, outputs = TOLERANCE[dtype], 40
    seeds = range(len(counts))
    matrices = [_apart(sound_matrix(encoding, outputs, width, seed)) for seed in seeds]
    x = torch.randn(sum(counts), width, device=DEVICE).to(dtype)
    out = torch.empty(len(x), outputs, dtype=dtype, device=DEVICE)
    grouped_encoded(x, counts, matrices, out)
    parts = zip(x.split(counts), matrices, strict=True)
    expected = torch.cat([r.double() @ _values(m).to(dtype).double().T for r, m in parts])
    atol = rtol * expected.std().item()
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


def test_groups_may_have_biases(public: None) -> None:
    matrices = [_apart(sound_matrix(BNB_INT8, 9, 70, seed)) for seed in range(2)]
    x, biases = torch.randn(5, 70, device=DEVICE), torch.randn(2, 9, device=DEVICE)
    out = torch.empty(5, 9, device=DEVICE)
    grouped_encoded(x, [2, 3], matrices, out, list(biases))
    parts = zip(x.split([2, 3]), matrices, biases, strict=True)
    expected = torch.cat([rows @ _values(matrix).T + bias for rows, matrix, bias in parts])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)
    grouped_encoded(x[:0], [0, 0], matrices, out[:0])


def test_columns_may_be_stored_in_another_order(public: None) -> None:
    matrix = _apart(sound_matrix(integers(4, 32, "float16", has_zeros=True), 20, 96))
    order = torch.randperm(96, device=DEVICE)
    moved, values = replace(matrix, columns=order), _values(matrix)
    assert torch.equal(_unpacked(moved, torch.float32)[:, order], values)
    x, out = torch.randn(3, 96, device=DEVICE), torch.empty(3, 20, device=DEVICE)
    expected = x[:, order] @ values.T
    multiply_encoded(x, moved, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    grouped_encoded(x, [1, 2], [moved, moved], out.zero_())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_what_is_not_finite_stays_in_its_output(public: None) -> None:
    """Also where it is read again beyond the last unit."""
    matrix = _apart(sound_matrix(BNB_INT8, 9, 70))
    matrix.rows[7, -4:] = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8, device=DEVICE)
    matrix.rows[8, -4:] = torch.tensor([0, 0, 0x80, 0x7F], dtype=torch.uint8, device=DEVICE)
    matrix.rows[8, :-4] = 1
    out = torch.empty(2, 9, device=DEVICE)
    multiply_encoded(torch.ones(2, 70, device=DEVICE), matrix, out)
    assert out[:, 7].isnan().all() and (out[:, 8] == torch.inf).all()
    assert out[:, :7].isfinite().all()


# Compiles for a GPU that is not there: the interpreter runs more than the compiler takes.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from profiles.encodings import find_encoding
from profiles.kernels.gpu import encoded, encoded_products, products, shared_attention

POINTERS = {"rows": "*u8", "matrix": "*u8", "table": "*fp32", "tiles": "*i64", "context": "*u8"}
FLOATS = {"x": "*bf16", "bias": "*bf16", "out": "*bf16", "q": "*bf16"}
NUMBERS = {"scale": "fp32", "soft_cap": "fp32"}


def compile_for(capability, kernel, constants, **options):
    types = POINTERS | FLOATS | NUMBERS
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


for name in ("Q4_K", "E4M3_128X128", "MAP4_G64_NESTED"):
    encoding = find_encoding(name)
    constants = encoded.constants_of(encoding)
    if not encoding.has_table:
        constants["table"] = None
    unpacking = constants | {"ROWS": 1, "UNITS": 64}
    found = compile_for(80, encoded._unpack, unpacking, enable_fp_fusion=False)
    assert "fma.rn.f32" not in found.asm["ptx"] and "ftz" not in found.asm["ptx"], name
tiles = {"HAS_BIAS": True, "HAS_TILES": True, "ADDS": False, "TILE_ROWS": 16, "TILE_OUTPUTS": 32}
found = compile_for(80, encoded_products._multiply, constants | tiles | {"UNITS": 4}, num_stages=1)
assert "mma" in found.asm["ptx"] and found.metadata.shared <= 48 * 1024
packed = {"BITS": 4, "GROUP": 64, "IS_WHOLE": True, "ALIGNMENT": 16, "DEPTH": 64, "ADDS": True}
packed |= {"HAS_TILES": False, "HAS_BIAS": True, "TILE_ROWS": 16, "TILE_OUTPUTS": 32}
found = compile_for(90, products._multiply, packed | {"tiles": None}, num_stages=4)
assert "mma" in found.asm["ptx"]
names = ["HAS_VOID_SLOTS", "HAS_SOFT_CAP", "HAS_SINKS", "HAS_SLOPES"]
shape = {"KV_HEADS": 8, "QUERIES": 4, "DIM": 128, "GROUP": 64, "BITS": 4, "CODE_BYTES": 64}
shape |= {"CODES": 64, "COLS": 64, "TOKENS": 32, "TILE_QUERIES": 16, **dict.fromkeys(names, False)}
shape |= dict.fromkeys(["void_slots", "sinks", "slopes"])
found = compile_for(90, shared_attention.attend_shared, shape, num_stages=1)
assert "mma" in found.asm["ptx"] and found.metadata.shared <= 48 * 1024
"""


def test_kernels_are_compiled(tmp_path: Path) -> None:
    """In a process whose Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
