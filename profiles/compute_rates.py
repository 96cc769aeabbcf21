"""How fast one device computes: its rates by dtype, size of the work and kind of cache."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from profiles.errors import InputError

# Width of the weights (``in_features``) that matrix products are measured with, and of narrow ones.
WIDTH, NARROW_WIDTH = 4096, 1024


def require_positive(what: str, value: float) -> None:
    """Raise ``InputError`` unless ``value`` is a finite number above zero."""
    if not math.isfinite(value) or value <= 0:
        raise InputError(what, got=value, allowed="a finite number above zero")


def require_not_negative(what: str, value: float) -> None:
    """Raise ``InputError`` unless ``value`` is a finite number, zero or more."""
    if not math.isfinite(value) or value < 0:
        raise InputError(what, got=value, allowed="a finite number, zero or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCurve:
    """A rate measured at several sizes of work.

    Parameters
    ----------
    sizes
        Increasing; rows of a matrix product, or bytes of one request.
    rates
        FLOP/s or bytes/s at each size.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.rates):
            got = f"{len(self.sizes)} sizes and {len(self.rates)} rates"
            raise InputError("rate curve", got=got, allowed="as many sizes as rates, at least one")
        for value in (*self.sizes, *self.rates):
            require_positive("rate curve", value)
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise InputError("rate curve sizes", got=list(self.sizes), allowed="increasing sizes")

    @classmethod
    def constant(cls, rate: float) -> RateCurve:
        """Make a curve with one rate at every size."""
        return cls(sizes=(1.0,), rates=(rate,))

    def at(self, size: float) -> float:
        """Interpolate the log rate over log size; constant beyond the ends."""
        if size <= self.sizes[0]:
            return self.rates[0]
        if size >= self.sizes[-1]:
            return self.rates[-1]
        i = bisect.bisect_right(self.sizes, size)
        low, high = self.sizes[i - 1], self.sizes[i]
        share = math.log(size / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(self.rates[i - 1]) + share * math.log(self.rates[i]))

    @property
    def peak(self) -> float:
        """The highest rate measured."""
        return max(self.rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRates:
    """Arithmetic rates of one device, by dtype name (``bfloat16``, ``float16``, ``float32``).

    Parameters
    ----------
    matmul
        FLOP/s of a matrix product over its number of rows (tokens).
    attention_prefill
        FLOP/s of causal attention over a prompt, counting the full square.
    attention_decode
        Bytes of KV cache per second that one decode step of attention reads.
    task_overhead_s
        Seconds that computing one layer costs beside its arithmetic: launching its operators.
    unpack_bytes_per_s
        Bytes of 16-bit output per second when 4-bit groups are unpacked; packing is counted at
        the same rate. 0 where it is not known.
    packed_attention_bytes_per_s
        What ``attention_decode`` is for a cache in 4-bit groups, in the bytes of the 16-bit cache
        that it stands for. 0 where it is not known: it is priced as unpacked first.
    sparse_attention_bytes_per_s
        What ``attention_decode`` is where each query attends to a tenth of the keys, in bytes of
        the whole cache. 0 where it is not known: what is not read is priced as saved.
    packed_matmul
        What ``matmul`` is for few rows and weights in 4-bit groups, multiplied as they lie. Where a
        dtype is not here, weights are unpacked first.
    narrow_matmul, narrow_packed_matmul
        The same for weights of ``NARROW_WIDTH`` instead of ``WIDTH``; may be empty.
    unpack_8bit_bytes_per_s, packed_attention_8bit_bytes_per_s
        The same as above for groups of 8 bits. 0 where they are not known: those of 4 bits serve.
    """

    matmul: Mapping[str, RateCurve]
    attention_prefill: Mapping[str, float]
    attention_decode: Mapping[str, float]
    task_overhead_s: float = 0.0
    unpack_bytes_per_s: float = 0.0
    packed_attention_bytes_per_s: float = 0.0
    sparse_attention_bytes_per_s: float = 0.0
    packed_matmul: Mapping[str, RateCurve] = field(default_factory=dict)
    narrow_matmul: Mapping[str, RateCurve] = field(default_factory=dict)
    narrow_packed_matmul: Mapping[str, RateCurve] = field(default_factory=dict)
    unpack_8bit_bytes_per_s: float = 0.0
    packed_attention_8bit_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.matmul:
            raise InputError("matmul rates", got="none", allowed="at least one dtype")
        for name, rates in (
            ("attention_prefill", self.attention_prefill),
            ("attention_decode", self.attention_decode),
        ):
            if set(rates) != set(self.matmul):
                raise InputError(
                    name, got=sorted(rates), allowed=f"the dtypes of matmul: {sorted(self.matmul)}"
                )
            for dtype, rate in rates.items():
                require_positive(f"{name}.{dtype}", rate)
        require_not_negative("task_overhead_s", self.task_overhead_s)
        for name in (
            "unpack_bytes_per_s", "packed_attention_bytes_per_s", "sparse_attention_bytes_per_s",
            "unpack_8bit_bytes_per_s", "packed_attention_8bit_bytes_per_s",
        ):  # fmt: skip
            require_not_negative(name, getattr(self, name))

    def matmul_rate(self, dtype: str, rows: float, width: int, *, packed: bool = False) -> float:
        """Return the FLOP/s of a product of ``rows`` with weights [any, ``width``].

        An element of the result costs its ``width`` products and something besides, so that
        seconds per FLOP are linear in ``1 / width``; two widths were measured.
        """
        wide, narrow = self.matmul, self.narrow_matmul
        if packed:
            wide, narrow = self.packed_matmul, self.narrow_packed_matmul
        wide_s = 1 / wide[dtype].at(rows)
        if dtype not in narrow:
            return 1 / wide_s
        # Where narrow weights were not measured with so many rows, the most that were count.
        known = min(rows, narrow[dtype].sizes[-1])
        added_s = max(0.0, 1 / narrow[dtype].at(known) - 1 / wide[dtype].at(known))
        share = (1 / width - 1 / WIDTH) / (1 / NARROW_WIDTH - 1 / WIDTH)
        return 1 / (wide_s + added_s * max(0.0, share))

    def unpack_rate(self, bits: int | None) -> float:
        """Return the rate of unpacking groups of ``bits``; 0 where it is not known."""
        eight = self.unpack_8bit_bytes_per_s if bits == 8 else 0.0
        return eight or self.unpack_bytes_per_s

    def packed_attention_rate(self, bits: int | None) -> float:
        """Return the rate of attention over a cache of ``bits``; 0 where it is not known."""
        eight = self.packed_attention_8bit_bytes_per_s if bits == 8 else 0.0
        return eight or self.packed_attention_bytes_per_s
