"""Encoded matrices in Triton, against their twins: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from profiles.compute_plan import DTYPES
from profiles.encodings import Encoding
from profiles.kernels import EncodedMatrix
from profiles.kernels.encoded_twins import unpack_encoded_twin
from tests.profiles.encoded_matrices import CASES, IDS, all_matrices, sound_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The kernels, imported only where they are wanted."""
    return importlib.import_module("profiles.kernels.gpu")


def _values(matrix: EncodedMatrix) -> torch.Tensor:
    return unpack_encoded_twin(
        matrix.rows, matrix.encoding, matrix.num_elements, matrix.table, matrix.first_row
    )


def _moved(matrix: EncodedMatrix) -> EncodedMatrix:
    """Return the matrix with rows that lie apart, at odd addresses."""
    raw = torch.full((len(matrix.rows), matrix.rows.shape[1] + 5), 0xAA, dtype=torch.uint8)
    rows = raw.to(DEVICE)[:, 1:-4]
    table = None if matrix.table is None else matrix.table.to(DEVICE)
    return replace(matrix, rows=rows.copy_(matrix.rows), table=table)


def _unpacked(gpu: ModuleType, matrix: EncodedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Unpack into a matrix whose rows lie apart; nothing beside it is written."""
    around = torch.full((len(matrix.rows), matrix.num_elements + 5), 7.0, dtype=dtype)
    out = around.to(DEVICE)[:, 2:-3]
    gpu.unpack_encoded(matrix, out)
    assert int((around == 7).sum()) >= 5 * len(out)
    return out


@pytest.mark.parametrize(("encoding", "width"), CASES, ids=IDS)
def test_values_are_those_of_the_twins(gpu: ModuleType, encoding: Encoding, width: int) -> None:
    for matrix in map(_moved, all_matrices(encoding, width)):
        found = _unpacked(gpu, matrix, torch.float32)
        torch.testing.assert_close(found, _values(matrix), rtol=0, atol=0, equal_nan=True)


MULTIPLIED = [d for d in DTYPES.values() if DEVICE == "cuda" or d != torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize(("encoding", "width"), CASES, ids=IDS)
def test_products(gpu: ModuleType, encoding: Encoding, width: int, dtype: torch.dtype) -> None:
    matrix = _moved(sound_matrix(encoding, 39, width))
    part = matrix.part(2, 39)
    rtol = TOLERANCE[dtype]
    values = _values(part).to(dtype).double()
    for num_rows in (1, 3):
        x = torch.randn(num_rows, width + 2, device=DEVICE).to(dtype)[:, :width]
        bias = torch.randn(37, device=DEVICE).to(dtype)
        expected = x.double() @ values.T
        atol = rtol * expected.std().item()
        out = torch.full((num_rows, 40), torch.nan, device=DEVICE, dtype=dtype)
        gpu.multiply_encoded(x, part, out[:, 1:-2], bias)
        torch.testing.assert_close(out[:, 1:-2].double(), expected + bias.double(), rtol=rtol, atol=atol)
        before = out[:, 1:-2].double()
        gpu.multiply_encoded(x, part, out[:, 1:-2], adds=True)
        torch.testing.assert_close(out[:, 1:-2].double(), before + expected, rtol=rtol, atol=atol)
        assert out.isnan().sum() == 3 * num_rows
