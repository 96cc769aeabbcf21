"""Matrix products: equal to products in double precision, whatever their shape and strides."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import kernels, product_parts
from profiles.kernels import build, products, twins
from profiles.packing import Packing
from profiles.product_parts import wide_bytes
from tests.profiles.rounded_inputs import multiplied_inputs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def always_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel do what it leaves to torch on this processor."""
    monkeypatch.setattr(products, "most_native_rows", lambda dtype: torch.inf)


def _noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _apart(rows: int, columns: int, dtype: torch.dtype, gap: int = 3) -> torch.Tensor:
    """Return NaNs around a matrix whose rows lie apart."""
    return torch.full((rows + 2, columns + gap + 2), torch.nan, dtype=dtype)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, depth: int) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance * depth**0.5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        (1, 1, 1),
        (1, 200, 96),
        (2, 65, 33),
        (3, 7, 70),
        (12, 130, 64),
        (13, 4, 2100),
        (17, 67, 1041),
        (40, 33, 160),
        (64, 5, 1024),
        (600, 30, 40),
    ],
)
def test_a_product_equals_one_in_double_precision(
    library: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int
) -> None:
    x = _apart(rows, inputs, dtype)[1:-1, 1 : inputs + 1].copy_(_noise(rows, inputs, dtype=dtype))
    weight = _apart(outputs, inputs, dtype)[1:-1, 2 : inputs + 2]
    weight.copy_(_noise(outputs, inputs, dtype=dtype))
    bias = _noise(outputs, dtype=dtype)
    product = x.double() @ weight.double().t()
    _assert_close(kernels.linear(x, weight), product, inputs)
    _assert_close(kernels.linear(x, weight, bias), product + bias.double(), inputs)
    around = _apart(rows, outputs, dtype)
    out = around[1:-1, 1 : outputs + 1]
    assert kernels.linear(x, weight, bias, out) is out
    _assert_close(out, product + bias.double(), inputs)
    before = out.copy_(_noise(rows, outputs, dtype=dtype)).double()
    kernels.linear(x, weight, None, out, adds=True)
    _assert_close(out, before + product.to(dtype).double(), inputs)
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [
        ([3, 0, 1, 17, 0], 67, 96),
        ([1], 5, 64),
        ([0, 2, 600], 4, 192),
        ([1, 1, 4], 35, 1100),
        # Each number of rows that is multiplied at once, in two parts of the dimensions.
        ([*range(1, 14)], 9, 1088),
    ],
)
def test_groups_are_multiplied_by_their_own_matrices(
    library: str, dtype: torch.dtype, bits: int, counts: list[int], outputs: int, inputs: int
) -> None:
    x = _noise(sum(counts), inputs, dtype=dtype)
    weights = matrices = list(_noise(len(counts), outputs, inputs, dtype=dtype))
    packing = None
    if bits:
        packing = Packing(num_elements=inputs, bits=bits)
        packed = torch.empty(len(counts), outputs, packing.row_bytes, dtype=torch.uint8)
        kernels.pack_rows(torch.stack(matrices), packing, packed)
        weights = list(packed)
        matrices = [twins.unpacked(matrix, packing, dtype) for matrix in packed]
    around = _apart(len(x), outputs, dtype)
    out = kernels.grouped_linear(x, counts, weights, around[1:-1, 1 : outputs + 1], packing=packing)
    expected = [
        multiplied_inputs(rows, packing) @ matrix.double().t()
        for rows, matrix in zip(x.split(counts), matrices, strict=True)
    ]
    _assert_close(out, torch.cat(expected), inputs)
    assert around.isnan().sum() == around.numel() - out.numel()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_neither_rows_nor_outputs_nor_threads_change_a_result(data: st.DataObject) -> None:
    """What an output is does not depend on which others are computed with it."""
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, outputs = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 90))
    inputs = data.draw(st.integers(1, 1300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    whole = kernels.linear(x, weight)
    row, output = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, outputs - 1))
    assert torch.equal(kernels.linear(x, weight[output:])[:, 0], whole[:, output])
    cut = data.draw(st.integers(0, rows))
    grouped = kernels.grouped_linear(x, [cut, rows - cut], [weight, weight])
    assert torch.equal(grouped, whole)
    assert torch.equal(kernels.linear(x[row : row + 1], weight)[0], whole[row])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(kernels.linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(library: str, dtype: torch.dtype) -> None:
    x, weight = _noise(20, 100, dtype=dtype), _noise(9, 100, dtype=dtype)
    x[5, 99] = torch.nan
    weight[7, 98] = torch.inf
    found = kernels.linear(x, weight)
    assert found[5].isnan().all() and not found[:, 7].isfinite().any()
    found[5], found[:, 7] = 0, 0
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("features", "dtype", "rows"),
    [
        ({"avx512f"}, torch.bfloat16, torch.inf),
        ({"avx512f", "amx_bf16"}, torch.bfloat16, 16),
        ({"avx512f", "amx_bf16"}, torch.float16, torch.inf),
        ({"avx512f"}, torch.float32, torch.inf),
        ({"avx2"}, torch.float32, torch.inf),
        (set(), torch.float16, torch.inf),
    ],
)
def test_torch_multiplies_what_it_is_faster_at(
    monkeypatch: pytest.MonkeyPatch, features: set[str], dtype: torch.dtype, rows: float
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "_features", lambda: frozenset(features))
    assert products.most_native_rows(dtype) == rows
    x, weight = _noise(70, 32, dtype=dtype), _noise(9, 32, dtype=dtype)
    expected = x.double() @ weight.double().t()
    _assert_close(kernels.linear(x, weight), expected, 32)
    out = x.new_zeros(70, 9)
    kernels.linear(x, weight, None, out, adds=True)
    _assert_close(out, expected, 32)


def test_memory_is_counted_with_the_sizes_of_the_kernel() -> None:
    source = (build.FOLDER / "product_weights.h").read_text(encoding="utf-8")
    sizes = {name: int(size) for name, size in re.findall(r"\b(k\w+) = (\d+)[;,]", source)}
    counted = (product_parts.WINDOW_ROWS, product_parts.TILE_OUTPUTS, product_parts.TILE_DEPTH)
    assert counted == (sizes["kWindow"], sizes["kOutputs"], sizes["kDepth"])
    # 64 sequences through a layer of a small model, and a long prompt through one of a large one.
    assert wide_bytes(64, 4864, num_threads=2) < 2**21 + 2**20
    assert wide_bytes(4096, 28672, num_threads=2) < 2**26
