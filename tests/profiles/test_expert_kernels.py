"""Kernels of experts with biases and a clamped gate, against float64 and against their twins."""

from __future__ import annotations

import pytest
import torch

from profiles import kernels
from profiles.kernels import twins
from profiles.packing import Packing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn", [16, 100])
def test_clamped_swiglu(library: str, dtype: torch.dtype, ffn: int) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(7, 2 * ffn).to(dtype) * 6).chunk(2, dim=1)
    wide, other = gate.double().clamp(max=7), up.double().clamp(-7, 7)
    expected = (other + 1) * wide * (1.702 * wide).sigmoid()
    kernels.clamped_swiglu(gate, up, limit=7.0, alpha=1.702)
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(gate.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_twin_round_a_clamped_gate_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate, up = (torch.randn(300, 48).to(dtype) * 4 for _ in range(2))
    other = gate.clone()
    kernels.clamped_swiglu(gate, up.clone(), limit=7.0, alpha=1.702)
    twins.clamped_swiglu(other, up, 7.0, 1.702)
    assert (gate == other).float().mean() > (0.5 if dtype == torch.float32 else 0.95)


def test_nan_stays_in_a_clamped_gate(library: str) -> None:
    gate, up = torch.full((1, 20), torch.nan), torch.zeros(1, 20)
    kernels.clamped_swiglu(gate, up, limit=7.0, alpha=1.702)
    assert gate.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "dim", "count"), [(3, 40, 11), (700, 100, 2000)])
@pytest.mark.parametrize("factors_as", ["rows", "float32", "none"])
def test_rows_are_added_to_those_of_their_tokens(
    library: str, dtype: torch.dtype, num_tokens: int, dim: int, count: int, factors_as: str
) -> None:
    torch.manual_seed(3)
    out = torch.randn(num_tokens, dim + 3).to(dtype)[:, :dim]
    rows = torch.randn(count, dim + 5).to(dtype)[:, :dim]
    tokens = torch.randint(num_tokens, (count,))
    factors = torch.rand(count, 1).to(torch.float32 if factors_as == "float32" else dtype)
    added, expected = rows.clone(), out.clone()
    if factors_as != "none":
        added.mul_(factors)
    # One after the other, so that each sum is rounded.
    for token, row in zip(tokens.tolist(), added, strict=True):
        expected[token] += row
    kernels.add_routed_rows(out, tokens, rows, None if factors_as == "none" else factors)
    if library != "twin" and dtype != torch.float32:
        assert torch.equal(out, expected)
        return
    # In float32, a product and its sum may be rounded at once. torch may sum in float32.
    tolerance = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 4])
def test_groups_have_biases_of_their_own(library: str, dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(2)
    counts = [3, 0, 1, 9]
    x, biases = torch.randn(13, 96).to(dtype), list(torch.randn(4, 35).to(dtype))
    weights = matrices = list(torch.randn(4, 35, 96).to(dtype))
    packing = Packing(num_elements=96, bits=bits) if bits else None
    if packing is not None:
        packed = torch.empty(4, 35, packing.row_bytes, dtype=torch.uint8)
        kernels.pack_rows(torch.stack(matrices), packing, packed)
        weights = list(packed)
        matrices = [twins.unpacked(matrix, packing, dtype) for matrix in packed]
    out = kernels.grouped_linear(x, counts, weights, packing=packing, biases=biases)
    expected = [
        rows.double() @ matrix.double().t() + bias.double()
        for rows, matrix, bias in zip(x.split(counts), matrices, biases, strict=True)
    ]
    tolerance = 20 * TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=tolerance, atol=tolerance)
