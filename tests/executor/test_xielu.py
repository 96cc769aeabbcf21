"""xIELU against transformers, for more elements than are computed at once."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import XIELUActivation

from executor.model import mlp
from profiles.kernels.xielu import ELEMENTS_AT_ONCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xielu_is_that_of_transformers(dtype: torch.dtype) -> None:
    theirs = XIELUActivation(alpha_p_init=1.3, alpha_n_init=0.9, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, ELEMENTS_AT_ONCE // 2 + 5, generator=generator).mul_(3).to(dtype)
    with torch.no_grad():
        expected = theirs(x)
        got = mlp.xielu(x.clone(), theirs.alpha_p, theirs.alpha_n)
    # One rounding more or less in the last place of bfloat16.
    torch.testing.assert_close(
        got, expected, rtol=1e-6 if dtype is torch.float32 else 1e-2, atol=1e-6
    )
