"""On a CPU a row of a product has the same bits alone and among any number of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from profiles import kernels
from profiles.encodings import BLOCK_ENCODINGS, Encoding
from profiles.kernels import products, row_tiles
from profiles.packing import Packing
from tests.profiles.encoded_matrices import OTHERS, sound_matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = 70
# Around what kernels take at once, and where torch would change its own.
PARTS = (1, 12, 13, 64, 65)
ENCODINGS = {
    # Small blocks may end within 256 elements.
    **{e.name: (e, 2400 if e.block_elements == 32 else 2304) for e in BLOCK_ENCODINGS.values()},
    **{encoding.name: (encoding, width) for encoding, width in OTHERS},
}

Product = Callable[[torch.Tensor], torch.Tensor]


def _noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _packed(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    packed = torch.empty(len(weight), packing.row_bytes, dtype=torch.uint8)
    assert kernels.pack_rows(weight[None], packing, packed[None])
    return packed


def _bits_of(name: str) -> int:
    return {"plain": 0, "4 bits": 4, "8 bits": 8}[name]


def _products(name: str, dim: int, dtype: torch.dtype) -> Iterator[Product]:
    """Yield a product with a plain matrix or one of our own bits: alone, with a bias, added to what
    is there, and in groups."""
    weight, bias = _noise(OUTPUTS, dim, dtype=dtype, seed=1), _noise(OUTPUTS, dtype=dtype, seed=2)
    bits = _bits_of(name)
    packing = Packing(num_elements=dim, bits=bits) if bits else None
    matrix = _packed(weight, packing) if packing else weight

    def multiply(x: torch.Tensor, own_bias: torch.Tensor | None, *, adds: bool) -> torch.Tensor:
        out = x[:, :1].expand(-1, OUTPUTS).clone()
        if packing:
            kernels.multiply_rows(x, matrix, packing, out, own_bias, adds=adds)
        else:
            kernels.linear(x, matrix, own_bias, out, adds=adds)
        return out

    def grouped(x: torch.Tensor) -> torch.Tensor:
        counts = [len(x) // 3, 0, len(x) - len(x) // 3]
        return kernels.grouped_linear(x, counts, [matrix] * 3, packing=packing, biases=[bias] * 3)

    yield lambda x: multiply(x, None, adds=False)
    yield lambda x: multiply(x, bias, adds=False)
    yield lambda x: multiply(x, bias, adds=True)
    yield grouped


def _encoded_products(encoding: Encoding, dim: int, dtype: torch.dtype) -> Iterator[Product]:
    matrix, bias = sound_matrix(encoding, OUTPUTS, dim), _noise(OUTPUTS, dtype=dtype, seed=2)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out = x[:, :1].expand(-1, OUTPUTS).clone()
        kernels.multiply_encoded(x, matrix, out, bias, adds=True)
        return out

    def grouped(x: torch.Tensor) -> torch.Tensor:
        counts, out = [len(x) // 3, 0, len(x) - len(x) // 3], x.new_empty(len(x), OUTPUTS)
        kernels.grouped_encoded(x, counts, [matrix] * 3, out, [bias] * 3)
        return out

    yield multiply
    yield grouped


def _assert_rows_are_apart(product: Product, x: torch.Tensor) -> None:
    whole = product(x)
    assert whole.isfinite().all()
    for size in PARTS:
        if size < len(x):
            assert torch.equal(torch.cat([product(rows) for rows in x.split(size)]), whole)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have native kernels multiply all rows, as with wide vectors and no matrix unit."""
    monkeypatch.setattr(products, "_features", lambda: frozenset({"avx512f"}))


@pytest.fixture
def matrix_unit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch multiply bfloat16, as where the processor has instructions for it."""
    monkeypatch.setattr(products, "_features", lambda: frozenset({"avx512f", "amx_bf16"}))
    with kernels.fixed_rows():
        yield


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "4 bits", "8 bits"])
@pytest.mark.parametrize(("rows", "dim"), [(600, 1041), (140, 3072)])
def test_rows_do_not_change_a_result(name: str, dtype: torch.dtype, rows: int, dim: int) -> None:
    x = _noise(rows, dim, dtype=dtype)
    for product in _products(name, dim, dtype):
        _assert_rows_are_apart(product, x)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "4 bits", "8 bits", "Q4_K", "MXFP4"])
def test_groups_of_all_sizes_are_multiplied_as_each_row_alone(
    name: str, dtype: torch.dtype
) -> None:
    """Groups of one call are multiplied in several ways, by their numbers of rows."""
    counts, dim = [1, 13, 0, 5, 27, 1, 520, 12, 70], 1280
    x = _noise(sum(counts), dim, dtype=dtype)
    out = x.new_empty(len(x), OUTPUTS)
    if name in ENCODINGS:
        encoded = sound_matrix(ENCODINGS[name][0], OUTPUTS, dim)
        kernels.grouped_encoded(x, counts, [encoded] * len(counts), out)
        alone = x.new_empty(len(x), OUTPUTS)
        for row, made in zip(x.split(1), alone.split(1), strict=True):
            kernels.multiply_encoded(row, encoded, made)
    else:
        bits, matrix = _bits_of(name), _noise(OUTPUTS, dim, dtype=dtype, seed=1)
        packing = Packing(num_elements=dim, bits=bits) if bits else None
        matrix = _packed(matrix, packing) if packing else matrix
        kernels.grouped_linear(x, counts, [matrix] * len(counts), out, packing=packing)
        product = next(iter(_products(name, dim, dtype)))
        alone = torch.cat([product(row) for row in x.split(1)])
    assert torch.equal(out, alone)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ENCODINGS))
def test_rows_do_not_change_a_result_of_encoded_weights(dtype: torch.dtype, name: str) -> None:
    encoding, dim = ENCODINGS[name]
    x = _noise(70, dim, dtype=dtype)
    for product in _encoded_products(encoding, dim, dtype):
        _assert_rows_are_apart(product, x)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", ["portable", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [96, 1041])
def test_rows_do_not_change_a_result_with_narrow_vectors(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    dim: int,
) -> None:
    library = request.getfixturevalue(kind)
    monkeypatch.setattr("profiles.kernels.call.load_library", lambda: library)
    for name in ("plain", "4 bits"):
        for product in _products(name, dim, dtype):
            _assert_rows_are_apart(product, _noise(66, dim, dtype=dtype))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_1", "MXFP4"])
def test_rows_do_not_change_a_result_of_encoded_weights_with_avx2(
    avx2: object, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("profiles.kernels.call.load_library", lambda: avx2)
    encoding, dim = ENCODINGS[name]
    for product in _encoded_products(encoding, dim, torch.bfloat16):
        _assert_rows_are_apart(product, _noise(70, dim, dtype=torch.bfloat16))


@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.parametrize("name", ["plain", "4 bits", "8 bits"])
@pytest.mark.parametrize(("rows", "dim"), [(66, 1041), (14, 3072)])
def test_rows_do_not_change_a_result_of_torch_in_tiles(name: str, rows: int, dim: int) -> None:
    x = _noise(rows, dim, dtype=torch.bfloat16)
    for product in _products(name, dim, torch.bfloat16):
        _assert_rows_are_apart(product, x)


@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "INT4_G128_F16_Z"])
def test_rows_do_not_change_a_result_of_unpacked_tiles(name: str) -> None:
    encoding, dim = ENCODINGS[name]
    for product in _encoded_products(encoding, dim, torch.bfloat16):
        _assert_rows_are_apart(product, _noise(66, dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("features", [{"avx512f"}, {"avx512f", "amx_bf16"}], ids=["wide", "unit"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_multiply_as_they_unpack(
    monkeypatch: pytest.MonkeyPatch, features: set[str], dtype: torch.dtype, bits: int
) -> None:
    """A prompt's rows are multiplied by unpacked weights, a token's by packed ones."""
    monkeypatch.setattr(products, "_features", lambda: frozenset(features))
    outputs, dim = 1100, 2304
    # Groups of 64 in 4 bits may be multiplied as integers.
    packing = Packing(num_elements=dim, bits=bits, group_size=32)
    x = _noise(70, dim, dtype=dtype)
    packed = _packed(_noise(outputs, dim, dtype=dtype, seed=1), packing)
    unpacked, found = torch.empty(outputs, dim, dtype=dtype), torch.empty(5, outputs, dtype=dtype)
    kernels.unpack_rows(packed[None], packing, unpacked[None])
    with kernels.fixed_rows():
        kernels.multiply_rows(x[:5], packed, packing, found)
        whole = kernels.linear(x, unpacked)
    assert torch.equal(found, whole[:5])
    reference = x.double() @ unpacked.double().t()
    torch.testing.assert_close(whole.double(), reference, rtol=1e-2, atol=0.5)


def test_the_rule_ends_with_its_last_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models may be open at once, and the first may close first."""
    monkeypatch.setattr(row_tiles, "_open_contexts", set())
    first, second = kernels.fixed_rows(), kernels.fixed_rows()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert row_tiles.rows_are_fixed()
    second.__exit__(None, None, None)
    assert not row_tiles.rows_are_fixed()


def test_a_product_of_no_rows_is_empty() -> None:
    x = torch.empty(0, 4)
    with kernels.fixed_rows():
        assert kernels.linear(x, torch.empty(3, 4)).shape == (0, 3)
