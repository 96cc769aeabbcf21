"""Matrix products in parts: equal to products in double precision, however they are cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from profiles import kernels, product_parts
from profiles.kernels import products
from profiles.product_parts import parts_of, wide_bytes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(params=["whole", "parts"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "parts":
        monkeypatch.setattr(product_parts, "LEAST_FLOP", 2**14)
        monkeypatch.setattr(product_parts, "WIDE_BYTES", 2**12)
    parts_of.cache_clear()
    yield request.param
    parts_of.cache_clear()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("multiplies_bfloat16", [True, False])
@pytest.mark.parametrize("num_rows", [1, 40, 130])
def test_a_product_equals_one_in_double_precision(
    dtype: torch.dtype,
    multiplies_bfloat16: bool,
    num_rows: int,
    cut: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: multiplies_bfloat16)
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((num_rows, 96), (200, 96), (200,))
    )
    for added in (None, bias):
        expected = x.double() @ weight.double().t() + (0 if added is None else added.double())
        stacked = torch.full((num_rows, 300), torch.nan, dtype=dtype)
        given = kernels.linear(x, weight, added, stacked[:, 50:250])
        for found in (kernels.linear(x, weight, added), given, stacked[:, 50:250]):
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=8 * tolerance)
        assert stacked[:, :50].isnan().all() and stacked[:, 250:].isnan().all()


def test_what_a_part_raises_ends_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for a part")

    monkeypatch.setattr(products, "_multiply", fail)
    monkeypatch.setattr(products, "_multiply_wide", fail)
    if not kernels.is_native(torch.ones(1)):
        pytest.skip("parts are handed out by native code")
    with pytest.raises(MemoryError, match="no room for a part"):
        kernels.linear(torch.ones(512, 1024).half(), torch.ones(2048, 1024).half())


@pytest.mark.parametrize("num_inputs", [1, 64, 5000])
@pytest.mark.parametrize("shape", [(8192, 2048), (100, 28672), (151936, 896), (33, 16)])
@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_parts_are_large_enough_and_hold_little(
    num_inputs: int, shape: tuple[int, int], num_threads: int
) -> None:
    out_features, in_features = shape
    plain, wide = (
        parts_of(num_inputs, *shape, num_threads=num_threads, is_wide=is_wide)
        for is_wide in (False, True)
    )
    assert plain.input_rows == num_inputs
    assert -(-out_features // plain.weight_rows) <= 8 * num_threads
    flop = 2 * num_inputs * plain.weight_rows * in_features
    num_bytes = 2 * plain.weight_rows * in_features
    is_one = plain.weight_rows == out_features
    assert is_one or flop >= 2**26 or num_bytes >= 2**22
    most = max(2**22, 64 * 4 * in_features)
    assert 4 * in_features * max(wide.input_rows, wide.weight_rows) <= most
    assert wide_bytes(num_inputs, *shape, num_threads=num_threads) <= num_threads * 3 * most
