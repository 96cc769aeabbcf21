"""Activations have the values of float64, and a row has the same bits alone and among others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch.nn import functional as F

from profiles import kernels

FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_those_of_float64(
    library: str, activation: str, dtype: torch.dtype
) -> None:
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([0.0, -0.0, 1e-6])]).to(dtype)
    expected = FUNCTIONS[activation](x.double())
    found = x[None].clone()
    kernels.activate(found, activation)
    eps = torch.finfo(dtype).eps
    # The upper tail of gelu's erfc and tanh cancels: what is left is small beside x.
    torch.testing.assert_close(found[0].double(), expected, rtol=2 * eps, atol=1e-6 + eps / 64)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_what_is_not_a_number_stays_one(library: str, activation: str) -> None:
    x = torch.tensor([[torch.nan, 100.0, -100.0, 1.0]])
    kernels.activate(x, activation)
    assert x[0, 0].isnan() and x[0, 1:].isfinite().all()


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("width", [1, 3, 100, 1000])
def test_a_row_has_the_same_bits_alone(activation: str, width: int) -> None:
    x = torch.randn(70, width)
    whole = x.clone()
    kernels.activate(whole, activation)
    for row in range(70):
        alone = x[row : row + 1].clone()
        kernels.activate(alone, activation)
        assert torch.equal(alone[0], whole[row])


# Factors that bfloat16 has.
FACTORS = torch.tensor([1.5]), torch.tensor([1.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_xielu_is_that_of_float64(library: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 20, 2001), torch.tensor([0.0, -1e-7, -0.3, 1e-6])]).to(dtype)
    wide, (above, below) = x.double(), FACTORS
    low = (wide.clamp(max=-1e-6).expm1() - wide) * below
    expected = torch.where(wide > 0, above * wide.square(), low) + 0.5 * wide
    found = x[None].clone()
    kernels.xielu(found, above.to(dtype), below.to(dtype))
    # Every step is rounded.
    eps = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(found[0].double(), expected, rtol=eps, atol=eps / 4)


@pytest.mark.parametrize("width", [1, 3, 100, 1000])
def test_a_row_of_xielu_has_the_same_bits_alone(width: int) -> None:
    x = torch.randn(70, width)
    whole = x.clone()
    kernels.xielu(whole, *FACTORS)
    for row in range(70):
        alone = x[row : row + 1].clone()
        kernels.xielu(alone, *FACTORS)
        assert torch.equal(alone[0], whole[row])
