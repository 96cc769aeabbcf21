"""The native kernels against plain arithmetic in float64, and against their twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from profiles import kernels
from profiles.kernels import build, twins
from tests.covering import covering

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
DTYPES = list(TOLERANCE)
# Compiles nothing into each object file, and links as it is told.
EMPTY_COMPILER = """#!/bin/sh
for last; do :; done
case "$*" in *" -c "*) exec c++ -c -x c++ /dev/null -o "$last";; esac
exec c++ "$@"
"""


# Batch, key heads, group, head_dim, tokens: whole tiles and parts, whole vectors and parts.
SHAPES = [
    (3, 2, 4, 128, 37),
    (5, 1, 1, 64, 16),
    (2, 3, 8, 80, 50),
    (4, 2, 3, 16, 7),
    (2, 2, 2, 8, 33),
    (2, 2, 6, 256, 20),
    (2, 2, 2, 96, 20),
    (2, 1, 71, 64, 5),
    (40, 4, 1, 32, 3),
]


def _attend_slowly(
    q: torch.Tensor,
    context: torch.Tensor,
    kv_heads: int,
    void: torch.Tensor,
    first_row: int,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend row by row in float64; ``void`` is bool [batch, tokens]."""
    group = q.shape[1] // kv_heads
    out = []
    for row in range(context.shape[2]):
        sequence, head = divmod(row + first_row, kv_heads)
        keys, values = context[~void[sequence], :, row].double().unbind(1)
        here = slice(head * group, (head + 1) * group)
        scores = q[sequence, here].double() @ keys.T / q.shape[2] ** 0.5
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        if sinks is not None:
            scores = torch.cat([scores, sinks[here, None].double()], dim=1)
        out.append(scores.softmax(-1)[:, : len(values)] @ values)
    return torch.stack(out)


def _inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, first_row: int, by_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make queries, a cache and the output, with strides as runs have them: token by token, or
    row by row with room for more tokens."""
    batch, kv_heads, group, head_dim, tokens = shape
    stacked = torch.randn(batch, kv_heads * (group + 2), head_dim).to(dtype)
    rows = batch * kv_heads - first_row
    used = 2 * rows * head_dim
    padded = torch.full((tokens, used + 32), torch.nan, dtype=dtype)
    padded[:, :used] = torch.randn(tokens, used).to(dtype)
    context = padded[:, :used].unflatten(1, (2, rows, head_dim))
    if by_row:
        longer = torch.full((rows, 2, tokens + 3, head_dim), torch.nan, dtype=dtype)
        context = longer[:, :, :tokens].copy_(context.permute(2, 1, 0, 3)).permute(2, 1, 0, 3)
    return stacked[:, : kv_heads * group], context, torch.empty(rows, group, head_dim, dtype=dtype)


@covering(
    {
        "dtype": DTYPES,
        "shape": SHAPES,
        "first_row": [0, 1],
        "is_padded": [False, True],
        "by_row": [False, True],
    }
)
def test_decode_attention(
    library: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    first_row: int,
    is_padded: bool,
    by_row: bool,
) -> None:
    batch, kv_heads, _, _, tokens = shape
    q, context, out = _inputs(shape, dtype, first_row, by_row)
    prompt_len = tokens - 1 if is_padded else 0
    lengths = torch.randint(1, tokens, (batch,), dtype=torch.int32) if is_padded else None
    void = torch.zeros(batch, tokens, dtype=torch.bool)
    void_slots = None
    if lengths is not None:
        void = (torch.arange(tokens) >= lengths[:, None]) & (torch.arange(tokens) < prompt_len)
        void_slots = torch.stack([lengths, torch.full_like(lengths, prompt_len)], dim=1)
    kernels.decode_attention(q, context, out, first_row=first_row, void_slots=void_slots)
    expected = _attend_slowly(q, context, kv_heads, void, first_row)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@covering(
    {
        "dtype": DTYPES,
        "shape": SHAPES,
        "soft_cap, sink_scale": [(3.0, None), (None, 2.0), (50.0, 2.0), (None, 200.0)],
    }
)
def test_soft_caps_sinks_and_void_slots_anywhere(
    library: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    soft_cap: float | None,
    sink_scale: float | None,
) -> None:
    """The void is before or behind a slot that each sequence sees, or is empty."""
    batch, kv_heads, _, _, tokens = shape
    q, context, out = _inputs(shape, dtype, 1, by_row=True)
    seen = torch.randint(0, tokens, (batch, 1))
    bounds = torch.randint(0, tokens + 1, (batch, 2)).sort(dim=1).values
    bounds[0] = torch.tensor([0, tokens - 1])
    before, behind = bounds.clamp(max=seen), bounds.clamp(min=seen + 1)
    before[0], behind[0] = bounds[0], bounds[0]
    void_slots = torch.where(torch.arange(batch)[:, None] % 2 == 0, before, behind).int()
    slots = torch.arange(tokens)
    void = (slots >= void_slots[:, :1]) & (slots < void_slots[:, 1:])
    sinks = None if sink_scale is None else torch.randn(q.shape[1]) * sink_scale
    kernels.decode_attention(
        q, context, out, first_row=1, void_slots=void_slots, soft_cap=soft_cap, sinks=sinks
    )
    expected = _attend_slowly(q, context, kv_heads, void, 1, soft_cap, sinks)
    tolerance = max(1e-5, TOLERANCE[dtype])
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_neither_overflow_nor_vanish(library: str, dtype: torch.dtype) -> None:
    q, context, out = _inputs((2, 2, 2, 64, 40), dtype, 0)
    # One token that gets everything; scores far beyond where exp overflows.
    context[:, 0] *= 0
    context[23, 0] = 100.0
    q.copy_(torch.full_like(q, 10.0))
    kernels.decode_attention(q, context, out)
    expected = context[23, 1][:, None].expand_as(out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_strides(dtype: torch.dtype) -> None:
    q, context, out = _inputs((3, 4, 3, 96, 50), dtype, 1)
    by_row = context.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    again = torch.empty_like(out)
    kernels.decode_attention(q, context, out, first_row=1)
    kernels.decode_attention(q, by_row, again, first_row=1)
    assert torch.equal(out, again)


def test_attention_does_not_depend_on_threads_nor_on_what_it_is_cut_into() -> None:
    q, context, whole = _inputs((9, 4, 3, 64, 45), torch.bfloat16, 0)
    threads = torch.get_num_threads()
    kernels.decode_attention(q, context, whole)
    try:
        torch.set_num_threads(1)
        alone = torch.empty_like(whole)
        kernels.decode_attention(q, context, alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)
    for first in (0, 7):
        part = torch.empty_like(whole[first:])
        kernels.decode_attention(q, context[:, :, first:].contiguous(), part, first_row=first)
        assert torch.equal(whole[first:], part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["key", "value"])
def test_a_nan_in_the_cache_is_not_lost(library: str, dtype: torch.dtype, place: str) -> None:
    q, context, out = _inputs((2, 2, 2, 64, 20), dtype, 0)
    context[11, int(place == "value"), 1, 5] = torch.nan
    kernels.decode_attention(q, context, out)
    assert out[1].isnan().any()
    assert not out[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 100, 3072])
def test_rms_norm(library: str, dtype: torch.dtype, dim: int) -> None:
    stacked = torch.randn(5, 4, dim).to(dtype) * 3
    x, weight = stacked[:, :3], torch.randn(dim).to(dtype)
    wide = x.double()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    expected = (wide * scale).to(dtype).double() * weight.double()
    kernels.rms_norm(x, weight, 1e-5, x)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance)


@covering(
    {
        "dtype": DTYPES,
        "head_dim, rotated": [(8, 8), (64, 64), (80, 80), (80, 32), (16, 4)],
        "positions": [6, 2],
        "interleaved": [False, True],
    }
)
def test_rotate(
    library: str,
    dtype: torch.dtype,
    head_dim: int,
    rotated: int,
    positions: int,
    interleaved: bool,
) -> None:
    stacked = torch.randn(6, 5, head_dim).to(dtype)
    before = stacked.clone()
    angles = torch.randn(positions, rotated // 2)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    wide = before[:, :3, :rotated].double()
    pairs = torch.complex(
        *((wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1))
    )
    factors = torch.complex(cosines.double(), sines.double()).repeat(6 // positions, 1)
    turned = pairs * factors[:, None]
    kernels.rotate(stacked[:, :3], cosines, sines, interleaved=interleaved)
    parts = turned.real, turned.imag
    expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    tolerance = TOLERANCE[dtype]
    found = stacked[:, :3, :rotated].double()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(stacked[:, 3:], before[:, 3:])
    assert torch.equal(stacked[..., rotated:], before[..., rotated:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn", [16, 100])
def test_swiglu(library: str, dtype: torch.dtype, ffn: int) -> None:
    gate, up = (torch.randn(7, 2 * ffn).to(dtype) * 20).chunk(2, dim=1)
    wide = gate.double()
    expected = (wide * wide.sigmoid()).to(dtype).double() * up.double()
    kernels.swiglu(gate, up)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(gate.double(), expected, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_twin_round_alike(dtype: torch.dtype) -> None:
    # A row whose scale rounds otherwise differs almost everywhere: with another seed, most may.
    torch.manual_seed(1)
    x, weight = torch.randn(9, 1, 96).to(dtype), torch.randn(96).to(dtype)
    ours, theirs = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, ours)
    twins.rms_norm(x, weight, 1e-6, theirs)
    same = (ours == theirs).float().mean()
    # The order of summation may part a rounding here and there.
    assert same > (0.5 if dtype == torch.float32 else 0.99)


def test_is_built_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "quick"
    # This test needs no kernels, and to compile them takes long.
    compiler.write_text(EMPTY_COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("ZIGZAG_COMPILER", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = build.load_library.__wrapped__
    assert load() is not None
    (built,) = (tmp_path / "zigzag").iterdir()
    changed = built.stat().st_mtime_ns
    assert load() is not None
    assert [built] == list((tmp_path / "zigzag").iterdir())
    assert built.stat().st_mtime_ns == changed


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_twins_serve_and_it_is_told(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ZIGZAG_COMPILER", compiler)
    assert build.load_library.__wrapped__() is None
    assert "no native CPU kernels" in caplog.text
    assert not list(tmp_path.rglob("kernels-*"))
