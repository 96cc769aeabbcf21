"""The Triton kernels against their twins: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from profiles.kernels.group_twins import pack_rows_twin, unpack_rows_twin
from profiles.packing import BITS, GROUP_SIZES, Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The kernels, imported only where they are wanted."""
    return importlib.import_module("profiles.kernels.gpu")


def _rows(num_elements: int) -> torch.Tensor:
    """Make rows of every kind: noise of all sizes, constants, zeros."""
    noise = torch.randn(2, 4, num_elements)
    noise[0, 0], noise[0, 1] = 0, 7
    noise[0, 2] *= 1e-30
    noise[1, 0] += 1000
    noise[1, 1] = noise[1, 1].clamp(-3, 3) * 1e38
    return noise.to(DEVICE)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_elements", [1, 64, 77, 128, 200])
def test_groups(gpu: ModuleType, bits: int, group_size: int, num_elements: int) -> None:
    packing = Packing(num_elements=num_elements, bits=bits, group_size=group_size)
    x = _rows(num_elements)
    packed = torch.full((2, 4, packing.row_bytes), 0xAA, dtype=torch.uint8, device=DEVICE)
    gpu.pack_rows(x, packing, packed)
    expected = torch.empty_like(packed)
    pack_rows_twin(x, packing, expected)
    # A division may round the other way, exactly between two codes.
    assert float((packed != expected).double().mean()) < 0.01
    assert torch.equal(packed[..., packing.code_bytes :], expected[..., packing.code_bytes :])
    out, plain = torch.empty_like(x), torch.empty_like(x)
    gpu.unpack_rows(packed, packing, out)
    unpack_rows_twin(packed, packing, plain)
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-35)
