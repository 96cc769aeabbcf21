"""Groups of few bits: no value further than half a step from its code's, whatever the group."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from costmodel.model.tensor_layout import packed_bytes
from profiles.kernels import multiply_rows, pack_rows, unpack_rows
from profiles.packing import BITS, GROUP_SIZES, Packing
from tests.covering import covering
from tests.profiles.rounded_inputs import multiplied_inputs, multiplies_codes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 7


def _rows(kind: str, num_elements: int) -> torch.Tensor:
    noise = torch.randn(ROWS, num_elements)
    return {
        "random": noise,
        "constant": torch.linspace(-9, 1e4, ROWS)[:, None].expand(ROWS, num_elements),
        "zero": torch.zeros(ROWS, num_elements),
        "tiny": noise * 1e-30,
        "huge": noise.clamp(-3, 3) * 1e38,
        "negative": -noise.abs() - 3,
        "far from zero": 1000 + noise,
        "one outlier": noise.index_fill(1, torch.tensor([num_elements - 1]), 1e4),
    }[kind].contiguous()


def _round_trip(x: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.full((len(x), packing.row_bytes), 0xAA, dtype=torch.uint8)
    pack_rows(x[None], packing, packed[None])
    out = torch.full((len(x), packing.num_elements), math.nan)
    unpack_rows(packed[None], packing, out[None])
    return packed, out


def _scales(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the scale of every element's group, as the layout states it."""
    shared = packed[:, packing.code_bytes :].reshape(len(packed), packing.num_groups, 4)
    scales = shared[..., :2].contiguous().view(torch.bfloat16).float()[..., 0]
    return scales.repeat_interleave(packing.group_size, dim=1)[:, : packing.num_elements]


@covering(
    {
        "bits": BITS,
        "group_size": GROUP_SIZES,
        "num_elements": [1, 31, 64, 128, 200, 333],
        "kind": [
            "random",
            "constant",
            "zero",
            "tiny",
            "huge",
            "negative",
            "far from zero",
            "one outlier",
        ],
    }
)
def test_nothing_is_further_than_half_a_step(
    library: str, bits: int, group_size: int, num_elements: int, kind: str
) -> None:
    packing = Packing(num_elements=num_elements, bits=bits, group_size=group_size)
    x = _rows(kind, num_elements)
    packed, out = _round_trip(x, packing)
    # The value itself is rounded to float32 once more.
    slack = 4 * torch.finfo(torch.float32).eps * x.abs()
    error = (out.double() - x.double()).abs()
    assert bool((error <= _scales(packed, packing).double() * 0.50001 + slack).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_elements", [128, 200, 77])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_is_its_twin(
    monkeypatch: pytest.MonkeyPatch, bits: int, num_elements: int, dtype: torch.dtype
) -> None:
    packing = Packing(num_elements=num_elements, bits=bits, group_size=64)
    x = torch.randn(50, 2 * num_elements).to(dtype)[:, :num_elements]
    packed, _ = _round_trip(x, packing)
    out = torch.empty(50, num_elements, dtype=dtype)
    unpack_rows(packed[None], packing, out[None])
    monkeypatch.setattr("profiles.kernels.call.load_library", lambda: None)
    twin_packed, _ = _round_trip(x, packing)
    assert torch.equal(packed, twin_packed)
    twin = torch.empty_like(out)
    unpack_rows(packed[None], packing, twin[None])
    torch.testing.assert_close(out, twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told(library: str, value: float) -> None:
    x = torch.randn(5, 70)
    x[3, 69] = value
    packing = Packing(num_elements=70, bits=4, group_size=32)
    packed = torch.empty(1, 5, packing.row_bytes, dtype=torch.uint8)
    assert not pack_rows(x[None], packing, packed)
    x[3, 69] = 0
    assert pack_rows(x[None], packing, packed)


def test_layout(library: str) -> None:
    """A row by hand: a group of 32 from -1 to 14 by ones, and one of three."""
    whole = [float(i % 16) - 1 for i in range(32)]
    packing = Packing(num_elements=35, bits=4, group_size=32)
    packed, out = _round_trip(torch.tensor([[*whole, 0.0, 30.0, 14.0]]), packing)
    # Code i beside code i + 16, which is the same here; then codes 0 and 7, and 15 alone.
    codes = bytes([i | i << 4 for i in range(16)]) + bytes([0 | 7 << 4, 15])
    halves = [struct.pack("<f", x)[2:] for x in (1.0, -1.0, 2.0, 0.0)]
    assert bytes(packed[0].tolist()) == codes + bytes(2) + b"".join(halves)
    assert out[0].tolist() == [*whole, 0.0, 30.0, 14.0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_elements", [1, 64, 65, 3072])
def test_size_is_what_the_memory_model_counts(bits: int, num_elements: int) -> None:
    groups = math.ceil(num_elements / 64)
    expected = 4 * math.ceil(num_elements * bits / 32) + 4 * groups
    assert Packing(num_elements=num_elements, bits=bits, group_size=64).row_bytes == expected
    assert packed_bytes(num_elements, bits, 64) == expected


def test_rows_may_lie_apart(library: str) -> None:
    """Keys of some heads inside wider rows, and a cache that holds more beside them."""
    packing = Packing(num_elements=64, bits=4, group_size=32)
    x = torch.randn(6, 5, 64)
    dense = torch.empty(6, 5, packing.row_bytes, dtype=torch.uint8)
    pack_rows(x, packing, dense)
    wide = torch.randn(6, 9, 64)
    wide[:, 2:7] = x
    apart = torch.full((5, 8, packing.row_bytes), 7, dtype=torch.uint8)
    pack_rows(wide[:, 2:7], packing, apart[:, 1:7].transpose(0, 1))
    assert torch.equal(apart[:, 1:7].transpose(0, 1), dense)
    assert bool((apart[:, [0, 7]] == 7).all())
    out = torch.empty(6, 5, 64)
    unpack_rows(apart[:, 1:7].transpose(0, 1), packing, out)
    expected = torch.empty_like(out)
    unpack_rows(dense, packing, expected)
    assert torch.equal(out, expected)


@covering(
    {
        "dtype": DTYPES,
        "bits": BITS,
        "group_size": [32, 64],
        "has_bias": [False, True],
        "rows, outputs, num_elements": [
            (1, 1, 64),
            (2, 7, 128),
            (3, 33, 77),
            (3, 10, 192),
            (4, 9, 64),
            (7, 16, 200),
            (64, 5, 96),
        ],
    }
)
def test_products_are_those_of_the_unpacked_matrix(
    library: str,
    dtype: torch.dtype,
    bits: int,
    has_bias: bool,
    group_size: int,
    rows: int,
    outputs: int,
    num_elements: int,
) -> None:
    packing = Packing(num_elements=num_elements, bits=bits, group_size=group_size)
    packed = torch.empty(1, outputs, packing.row_bytes, dtype=torch.uint8)
    pack_rows(torch.randn(1, outputs, num_elements), packing, packed)
    kept = torch.float32 if multiplies_codes(dtype, packing) else dtype
    matrix = torch.empty(1, outputs, num_elements, dtype=kept)
    unpack_rows(packed, packing, matrix)
    x = torch.randn(rows, num_elements).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    wide = torch.full((rows, outputs + 3), torch.nan, dtype=dtype)
    multiply_rows(x, packed[0], packing, wide[:, 2:-1], bias)
    inputs, exact = multiplied_inputs(x, packing), matrix[0].double().T
    expected = inputs @ exact + (bias.double() if bias is not None else 0)
    # Sums are float32: their rounding grows with the terms, and not with what remains of them.
    summed = 4 * torch.finfo(torch.float32).eps * (inputs.abs() @ exact.abs())
    error = (wide[:, 2:-1].double() - expected).abs()
    assert bool((error <= summed + torch.finfo(dtype).eps * expected.abs()).all())
    assert bool(wide[:, [0, 1, -1]].isnan().all())
