"""Products with the codes of 4-bit weights: equal to those of inputs that are rounded to 8 bits."""

from __future__ import annotations

import pytest
import torch

from profiles import kernels
from profiles.kernels import twins
from profiles.packing import Packing
from tests.profiles.rounded_inputs import GROUP, TOP, rounded_inputs

EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(autouse=True, params=["native", "avx2"])
def integer_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the kernels of each kind of processor that multiplies integers."""
    if request.param == "avx2":
        found = request.getfixturevalue("avx2")
        monkeypatch.setattr("profiles.kernels.call.load_library", lambda: found)
    if not kernels.multiplies_codes(torch.bfloat16):
        pytest.skip("products of this processor are those of floats")


def _matrix(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, Packing]:
    """Return a packed matrix, and what its codes stand for in double precision."""
    packing = Packing(num_elements=inputs, bits=4)
    packed = torch.empty(1, outputs, packing.row_bytes, dtype=torch.uint8)
    kernels.pack_rows(torch.randn(1, outputs, inputs) + 0.3, packing, packed)
    values = twins.unpacked(packed[0], packing, torch.float32)
    return packed[0], values.double(), packing


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    # Each number of rows that is multiplied at once; of each block one to four groups.
    [
        (1, 1, 64),
        (1, 37, 320),
        (2, 16, 128),
        (3, 33, 192),
        (4, 70, 256),
        (7, 64, 448),
        (12, 65, 1088),
        (29, 100, 768),
        (600, 5, 576),
    ],
)
def test_inputs_are_rounded_to_eight_bits(rows: int, outputs: int, inputs: int) -> None:
    packed, values, packing = _matrix(outputs, inputs)
    x, bias = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    # Groups differ in size by far.
    x[:, : inputs // 2] *= 100
    around = torch.full((rows + 2, outputs + 5), torch.nan, dtype=torch.bfloat16)
    out = around[1:-1, 2:-3]
    kernels.multiply_rows(x, packed, packing, out, bias)
    expected = rounded_inputs(x) @ values.T + bias.double()
    size = x.double().abs() @ values.abs().T
    assert ((out.double() - expected).abs() <= EPS * expected.abs() + 1e-5 * size).all()
    assert around.isnan().sum() == around.numel() - out.numel()


def test_no_input_is_further_than_half_a_step_from_its_code() -> None:
    packed, values, packing = _matrix(40, 640)
    x = torch.randn(9, 640).bfloat16()
    out = kernels.grouped_linear(x, [4, 5], [packed] * 2, packing=packing)
    half_steps = x.unflatten(1, (-1, GROUP)).abs().amax(2) / TOP / 2
    sizes = values.abs().unflatten(1, (-1, GROUP)).sum(2)
    exact = x.double() @ values.T
    limit = half_steps.double() @ sizes.T + 1.01 * EPS * exact.abs()
    assert ((out.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("rows", [1, 2, 13])
def test_inputs_that_are_zero_tiny_or_not_finite_stay_in_their_rows(rows: int) -> None:
    packed, values, packing = _matrix(20, 256)
    x = torch.randn(3 * rows, 256).bfloat16()
    x[:rows] = 0
    x[rows : 2 * rows, :64] = 1e-38
    x[2 * rows, 200], x[-1, 3] = torch.nan, torch.inf
    out = torch.empty(3 * rows, 20, dtype=torch.bfloat16)
    for part in range(3):
        chosen = slice(part * rows, (part + 1) * rows)
        kernels.multiply_rows(x[chosen], packed, packing, out[chosen])
    assert (out[:rows] == 0).all()
    assert out[2 * rows].isnan().all() and out[-1].isnan().all()
    assert out[rows : 2 * rows].isfinite().all() and out[2 * rows + 1 : -1].isfinite().all()
    x[rows : 2 * rows, :64] = 0
    expected = rounded_inputs(x[rows : 2 * rows]) @ values.T
    torch.testing.assert_close(out[rows : 2 * rows].double(), expected, rtol=EPS, atol=0.01)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_inputs_do_not_overflow(rows: int, sign: int) -> None:
    packing = Packing(num_elements=256, bits=4)
    matrix = torch.ones(1, 16, 256)
    # Of each group, one code is 0 and 63 are 15.
    matrix[..., ::64] = 0
    packed = torch.empty(1, 16, packing.row_bytes, dtype=torch.uint8)
    kernels.pack_rows(matrix, packing, packed)
    out = torch.empty(rows, 16, dtype=torch.bfloat16)
    kernels.multiply_rows(torch.full((rows, 256), float(sign)).bfloat16(), packed[0], packing, out)
    assert ((out.float() - sign * 252).abs() <= 2).all()


@pytest.mark.parametrize("inputs", [64, 192, 1088])
def test_a_row_has_the_same_bits_alone_and_among_others(inputs: int) -> None:
    packed, _, packing = _matrix(37, inputs)
    x = torch.randn(13, inputs).bfloat16()
    whole, alone = torch.empty(2, 13, 37, dtype=torch.bfloat16)
    kernels.multiply_rows(x, packed, packing, whole)
    for row, out in zip(x.split(1), alone.split(1), strict=True):
        kernels.multiply_rows(row, packed, packing, out)
    assert torch.equal(alone, whole)


def test_groups_of_other_sizes_keep_their_inputs() -> None:
    assert not kernels.multiplies_codes(torch.bfloat16, 32)
    assert not kernels.multiplies_codes(torch.float32)
