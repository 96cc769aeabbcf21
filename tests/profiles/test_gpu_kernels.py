"""The Triton kernels against their twins: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from profiles.compute_plan import DTYPES
from profiles.kernels import twins
from profiles.kernels.group_twins import pack_rows_twin, unpack_rows_twin
from profiles.packing import BITS, GROUP_SIZES, Packing
from tests.covering import covering

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu_kernels
# The interpreter multiplies bfloat16 as if its bits were whole numbers.
MULTIPLIED = [d for d in DTYPES.values() if DEVICE == "cuda" or d != torch.bfloat16]


@pytest.fixture(scope="module")
def gpu(quick_interpreter: None) -> ModuleType:
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


@covering({"bits": BITS, "group_size": GROUP_SIZES, "num_elements": [1, 64, 77, 128, 200]})
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


@pytest.mark.parametrize(
    # At least two tiles of tokens each, the last one cut; the interpreter is slow with many.
    ("bits", "tokens", "kv_heads", "group", "dim", "group_size"),
    [
        (4, 75, 3, 1, 64, 64),
        (8, 75, 3, 1, 64, 64),
        (8, 27, 2, 4, 128, 64),
        (4, 27, 1, 7, 96, 32),
        (4, 75, 2, 3, 32, 64),
        # More query heads than a tile has, and rows too short for tiles.
        (8, 27, 1, 17, 32, 32),
        (4, 75, 2, 2, 16, 64),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "is_padded", "soft_cap", "has_sinks", "has_slopes"),
    [
        (torch.float32, True, None, False, False),
        (torch.float32, False, 5.0, False, False),
        (torch.float16, True, None, True, False),
        (torch.float32, True, 50.0, True, False),
        (torch.float16, True, None, False, True),
    ],
)
def test_attention(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    tokens: int,
    kv_heads: int,
    group: int,
    dim: int,
    group_size: int,
    dtype: torch.dtype,
    is_padded: bool,
    soft_cap: float | None,
    has_sinks: bool,
    has_slopes: bool,
) -> None:
    """Of some rows of a padded batch, token by token or row by row; its last prompt lets nothing
    of the first tokens be seen."""
    batch, prompt_len = 3, tokens - 5
    monkeypatch.setattr("profiles.kernels.gpu.attention.SHARED_CODES", 1024)
    packing = Packing(num_elements=dim, bits=bits, group_size=group_size)
    assert gpu.attends_packed(packing)
    q = torch.randn(batch, kv_heads * group, dim, device=DEVICE).to(dtype)
    plain = torch.randn(tokens * 2, batch * kv_heads, dim, device=DEVICE)
    packed = torch.empty(*plain.shape[:2], packing.row_bytes, dtype=torch.uint8, device=DEVICE)
    pack_rows_twin(plain, packing, packed)
    context = packed.unflatten(0, (tokens, 2))[:, :, 1:]
    counts = torch.tensor([prompt_len, prompt_len // 2, 0], dtype=torch.int32, device=DEVICE)
    ends = torch.full_like(counts, prompt_len)
    void_slots = torch.stack([counts, ends], dim=1) if is_padded else None
    sinks = torch.randn(q.shape[1], device=DEVICE) if has_sinks else None
    slopes = torch.rand(q.shape[1], device=DEVICE) if has_slopes else None
    out = torch.full((batch * kv_heads - 1, group, dim), torch.nan, device=DEVICE).to(dtype)
    expected = torch.empty_like(out)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for view in (context, context.transpose(0, 2).contiguous().transpose(0, 2)):
        how: dict[str, Any] = {
            "first_row": 1,
            "void_slots": void_slots,
            "scale": dim**-0.5,
            "soft_cap": soft_cap,
            "sinks": sinks,
            "slopes": slopes,
            "packing": packing,
        }
        gpu.decode_attention(q, view, out, **how)
        twins.decode_attention(q, view, expected, **how, sparsity=1.0)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("heads", "dim"), [(1, 768), (3, 128), (2, 20)])
def test_rms_norm(gpu: ModuleType, dtype: torch.dtype, heads: int, dim: int) -> None:
    """Of some of the heads that lie side by side, in place."""
    x = torch.randn(5, heads + 1, dim, device=DEVICE).to(dtype)
    weight = torch.randn(dim, device=DEVICE).to(dtype)
    expected = torch.empty_like(x[:, :heads])
    twins.rms_norm(x[:, :heads], weight, 1e-6, expected)
    untouched = x[:, heads].clone()
    gpu.rms_norm(x[:, :heads], weight, 1e-6, x[:, :heads])
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(x[:, :heads], expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x[:, heads], untouched)


@covering(
    {
        "dtype": list(DTYPES.values()),
        "heads, dim": [(1, 16), (40, 64), (3, 20)],
        "positions": [6, 2],
        "share, interleaved": [(2, False), (2, True), (4, False), (4, True)],
    }
)
def test_rotate(
    gpu: ModuleType,
    dtype: torch.dtype,
    heads: int,
    dim: int,
    positions: int,
    share: int,
    interleaved: bool,
) -> None:
    x = torch.randn(6, heads + 1, dim, device=DEVICE).to(dtype)
    angles = torch.randn(positions, dim // share, device=DEVICE)
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = x.clone()
    twins.rotate(expected[:, :heads], *rotation, interleaved=interleaved)
    gpu.rotate(x[:, :heads], *rotation, interleaved=interleaved)
    # The interpreter cuts off what a GPU rounds to bfloat16.
    cut = 0.0 if DEVICE == "cuda" else 1.6e-2
    tolerance = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: cut}[dtype]
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def test_rows_whose_groups_differ_are_attended_otherwise(gpu: ModuleType) -> None:
    for dim in (80, 33):
        assert not gpu.attends_packed(Packing(num_elements=dim, bits=4, group_size=64))


@covering(
    {
        "dtype": MULTIPLIED,
        "bits, group_size": [(0, 32), (4, 32), (4, 128), (8, 128)],
        # Groups of few rows, one of more than a tile, and inputs that no tile divides.
        "counts, outputs, inputs": [([3, 0, 1, 17, 0], 67, 77), ([0, 70], 130, 256)],
    }
)
def test_grouped_products(
    gpu: ModuleType,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    counts: list[int],
    outputs: int,
    inputs: int,
) -> None:
    """Of rows that lie apart, with matrices at odd places."""
    x = torch.randn(sum(counts), inputs + 3, device=DEVICE).to(dtype)[:, :inputs]
    places = torch.randn(len(counts), outputs + 1, inputs, device=DEVICE).to(dtype)
    packing = None
    if bits:
        packing = Packing(num_elements=inputs, bits=bits, group_size=group_size)
        plain = places
        places = torch.empty(*plain.shape[:2], packing.row_bytes, dtype=torch.uint8, device=DEVICE)
        pack_rows_twin(plain, packing, places)
    weights = list(places[:, 1:])
    around = torch.full((len(x), outputs + 2), torch.nan, device=DEVICE).to(dtype)
    gpu.grouped_linear(x, counts, weights, packing, around[:, 1:-1])
    expected = torch.empty(len(x), outputs, device=DEVICE).to(dtype)
    twins.grouped_linear(x, counts, weights, packing, expected)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(
        around[:, 1:-1], expected, rtol=tolerance, atol=tolerance * inputs**0.5
    )
    assert around.isnan().sum() == 2 * len(x)


@covering(
    {
        "dtype": MULTIPLIED,
        "bits, group_size": [(4, 32), (4, 128), (8, 64)],
        # Several batches pass through a shared expert together, so that there may be many.
        "num_rows": [1, 16, 35],
        "outputs, inputs": [(67, 77), (130, 256)],
        "is_biased": [False, True],
        "adds": [False, True],
    }
)
def test_few_rows_are_multiplied_by_packed_weights(
    gpu: ModuleType,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    num_rows: int,
    outputs: int,
    inputs: int,
    is_biased: bool,
    adds: bool,
) -> None:
    """Of rows that are apart, with a matrix at an odd place; nothing else is written."""
    packing = Packing(num_elements=inputs, bits=bits, group_size=group_size)
    plain = torch.randn(1, outputs + 1, inputs, device=DEVICE)
    packed = torch.empty(*plain.shape[:2], packing.row_bytes, dtype=torch.uint8, device=DEVICE)
    pack_rows_twin(plain, packing, packed)
    matrix = packed[0, 1:]
    x = torch.randn(num_rows, inputs + 3, device=DEVICE).to(dtype)[:, :inputs]
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if is_biased else None
    before = torch.randn(num_rows, outputs, device=DEVICE).to(dtype)
    around = torch.full((num_rows, outputs + 2), torch.nan, device=DEVICE).to(dtype)
    out = around[:, 1:-1].copy_(before)
    gpu.multiply_rows(x, matrix, packing, out, bias, adds=adds)
    expected = x.double() @ twins.unpacked(matrix, packing, dtype).double().T
    expected += 0 if bias is None else bias.double()
    expected += before.double() if adds else 0
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * inputs**0.5)
    assert around.isnan().sum() == 2 * num_rows


def test_groups_without_rows_are_no_product(gpu: ModuleType) -> None:
    x, weight = torch.ones(0, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    gpu.grouped_linear(x, [0, 0], [weight, weight], None, x[:, :3])
