"""Causal attention of the tokens of one prompt, or of a part of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from profiles.kernels import prompt_twins
from profiles.kernels.attention import address
from profiles.kernels.call import call_kernel, is_native


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRun:
    """Keys and values of adjacent positions of one sequence.

    Parameters
    ----------
    keys
        [tokens, kv heads, head_dim], or with a table those of pages, [pages, kv heads, page_tokens,
        head_dim]; dense in the last dimension.
    values
        The same of ``value_dim`` elements.
    table
        The numbers of the run's pages in order, int32 [pages of the run], dense.
    num_tokens
        Tokens of the run; those behind it on the last page are not read.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_tokens: int
    table: torch.Tensor | None = None

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> KeyRun:
        """Return a run of whole tensors, [tokens, kv heads, elements]."""
        return cls(keys=keys, values=values, num_tokens=len(keys))

    @classmethod
    def of_pages(cls, pool: torch.Tensor, table: torch.Tensor, num_tokens: int) -> KeyRun:
        """Return a run in pages of a cache that is not packed, [pages, kv heads, vectors,
        page_tokens, head_dim]; with one vector, it is both key and value."""
        return cls(keys=pool[:, :, 0], values=pool[:, :, -1], table=table, num_tokens=num_tokens)

    def gathered_keys(self) -> torch.Tensor:
        """Return the keys in one tensor, [tokens, kv heads, head_dim]."""
        return self._gathered(self.keys)

    def gathered_values(self) -> torch.Tensor:
        """Return the values in one tensor, [tokens, kv heads, value_dim]."""
        return self._gathered(self.values)

    def _gathered(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            return vectors
        return vectors[self.table.long()].transpose(1, 2).flatten(0, 1)[: self.num_tokens]


def prompt_attention(
    q: torch.Tensor,
    runs: Sequence[KeyRun],
    out: torch.Tensor,
    *,
    first_position: int = 0,
    first_key: int = 0,
    window: int | None = None,
    is_chunked: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> None:
    """Attend with some tokens of one sequence to itself and to the tokens before each.

    Keys are taken in tiles that begin at multiples of a constant position. So the result of a token
    has the same bits on a CPU, whichever tokens are beside it in ``q``, and however the keys are
    cut into runs: a prompt may be attended in parts, or behind a prefix that lies elsewhere.

    Parameters
    ----------
    q
        Queries of adjacent positions, [tokens, heads, head_dim], dense in the last dimension.
    runs
        Keys and values in the order of their positions, in the dtype of ``q``. Together they reach
        at least to the last query.
    out
        The result, [tokens, heads, value_dim], dense in the last dimension.
    first_position
        The position of the first query.
    first_key
        The position of the first key; no query sees any before it.
    window
        Tokens that a query sees: itself and those just before it. ``None`` is all of them.
    is_chunked
        Whether a query sees instead the tokens from the last multiple of ``window`` on.
    scale
        Factor of the scores; ``None`` stands for ``head_dim ** -0.5``.
    soft_cap
        ``c`` in ``c tanh(scores / c)``, after the scale; ``None`` leaves the scores.
    sinks
        A further score of each query head, float32 [heads], dense. It takes part in the softmax and
        has no value.
    slopes
        Of ALiBi, float32 [heads], dense: what a query head's scores lose, after the soft cap, for
        each token between key and query.

    Notes
    -----
    Arithmetic is in float32. Temporaries of the native kernel: less than 1 MiB for each thread at a
    ``head_dim`` of 256.
    """
    tokens, num_heads, head_dim = q.shape
    kv_heads, value_dim = runs[0].keys.shape[1], out.shape[2]
    assert out.shape[:2] == (tokens, num_heads) and num_heads % kv_heads == 0
    assert q.stride(2) == out.stride(2) == 1 and out.dtype == q.dtype
    assert first_key + sum(run.num_tokens for run in runs) >= first_position + tokens
    for run in runs:
        assert run.keys.shape[1] == run.values.shape[1] == kv_heads
        assert run.keys.shape[-1] == head_dim and run.values.shape[-1] == value_dim
        assert run.keys.stride(-1) == run.values.stride(-1) == 1
        assert run.keys.dtype == run.values.dtype == q.dtype
        assert run.table is None or run.table.dtype == torch.int32
    for of_heads in (sinks, slopes):
        assert of_heads is None or (of_heads.dtype, of_heads.shape) == (torch.float32, q.shape[1:2])
    if tokens == 0:
        return
    how: dict[str, Any] = {
        "first_position": first_position,
        "first_key": first_key,
        "window": window,
        "is_chunked": is_chunked,
        "scale": head_dim**-0.5 if scale is None else scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "slopes": slopes,
    }
    if is_native(q):
        _attend_natively(q, runs, out, **how)
        return
    keys = torch.cat([run.gathered_keys() for run in runs])
    values = torch.cat([run.gathered_values() for run in runs])
    prompt_twins.prompt_attention(q, keys, values, out, **how)


class _Run(ctypes.Structure):
    """A run, in the order of ``key_tile.h``."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_stride", ctypes.c_long),
        ("value_stride", ctypes.c_long),
        ("key_head_stride", ctypes.c_long),
        ("value_head_stride", ctypes.c_long),
        ("table", ctypes.c_void_p),
        ("key_page_stride", ctypes.c_long),
        ("value_page_stride", ctypes.c_long),
        ("page_tokens", ctypes.c_long),
        ("tokens", ctypes.c_long),
    )


class _Arguments(ctypes.Structure):
    """The arguments of the native kernel, in the same order."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_long),
        ("q_head_stride", ctypes.c_long),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_long),
        ("out_head_stride", ctypes.c_long),
        ("tokens", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("group", ctypes.c_long),
        ("dim", ctypes.c_long),
        ("value_dim", ctypes.c_long),
        ("runs", ctypes.POINTER(_Run)),
        ("num_runs", ctypes.c_long),
        ("first_position", ctypes.c_long),
        ("first_key", ctypes.c_long),
        ("window", ctypes.c_long),
        ("is_chunked", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
    )


def _native_run(run: KeyRun) -> _Run:
    # From token to token, and from head to head; pages have the heads first.
    token, head = (0, 1) if run.table is None else (2, 1)
    return _Run(
        keys=run.keys.data_ptr(),
        values=run.values.data_ptr(),
        key_stride=run.keys.stride(token),
        value_stride=run.values.stride(token),
        key_head_stride=run.keys.stride(head),
        value_head_stride=run.values.stride(head),
        table=address(run.table),
        key_page_stride=run.keys.stride(0),
        value_page_stride=run.values.stride(0),
        page_tokens=run.keys.shape[token],
        tokens=run.num_tokens,
    )


def _attend_natively(
    q: torch.Tensor,
    runs: Sequence[KeyRun],
    out: torch.Tensor,
    *,
    first_position: int,
    first_key: int,
    window: int | None,
    is_chunked: bool,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> None:
    """See ``prompt_attention``, with the native kernel on the CPU."""
    tokens, num_heads, head_dim = q.shape
    kv_heads = runs[0].keys.shape[1]
    arguments = _Arguments(
        q=q.data_ptr(),
        q_stride=q.stride(0),
        q_head_stride=q.stride(1),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        out_head_stride=out.stride(1),
        tokens=tokens,
        kv_heads=kv_heads,
        group=num_heads // kv_heads,
        dim=head_dim,
        value_dim=out.shape[2],
        runs=(_Run * len(runs))(*map(_native_run, runs)),
        num_runs=len(runs),
        first_position=first_position,
        first_key=first_key,
        window=window or 0,
        is_chunked=is_chunked,
        scale=scale,
        soft_cap=soft_cap or 0.0,
        sinks=address(sinks),
        slopes=address(slopes),
    )
    call_kernel("prompt_attention", q.dtype, ctypes.byref(arguments))
