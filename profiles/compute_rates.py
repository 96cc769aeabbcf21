"""How fast one device computes: its rates by dtype, size of the work and kind of cache."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from profiles.encodings import Kind
from profiles.errors import InputError
from profiles.packing import DIRECT_ROWS
from profiles.product_parts import WINDOW_ROWS
from profiles.rate_curve import RateCurve, require_not_negative, require_positive

# Width of the weights (``in_features``) that matrix products are measured with, and of narrow ones.
WIDTH, NARROW_WIDTH = 4096, 1024
# What decode attention is measured with: query heads that share a key head, and elements of a head;
# and with more queries for every element.
GROUP_SIZE, HEAD_DIM = 4, 128
MANY_QUERIES, SHORT_HEAD_DIM = 8, 64
# Of a cache that is not packed, where rates go by its bits.
FULL = "full"


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
        Seconds that computing one layer costs beside its arithmetic: launching its operators. Of
        a GPU, while the CPU attends.
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
        What ``matmul`` is for weights in 4-bit groups, without unpacking. Where a dtype is not
        here, weights are unpacked first. A GPU unpacks weights for more than 16 rows. A CPU unpacks
        them for more than 64 rows, unless more were measured.
    narrow_matmul, narrow_packed_matmul
        The same for weights of ``NARROW_WIDTH`` instead of ``WIDTH``; may be empty.
    unpack_8bit_bytes_per_s, packed_attention_8bit_bytes_per_s
        The same as above for groups of 8 bits. 0 where they are not known: those of 4 bits serve.
    attention_one_query
        Factor, 1 or more, by which attention of decode is faster where each key head has one query
        head. By bits of the cache, as below; what is not there is not faster.
    attention_many_queries, attention_by_token
        Shares of its rate, above 0 to 1, that attention of decode keeps where ``MANY_QUERIES``
        heads share a key head of ``SHORT_HEAD_DIM``, and where the cache is stored token by token,
        as a moving cache is, instead of row by row. By bits of the cache: ``full``, ``8``, ``4``;
        what is not there keeps all.
    encoded_matmul
        What ``matmul`` is for few rows and weights that are encoded, by the name of their ``Kind``;
        measured in bfloat16, for every dtype. What is not there is priced as ``packed_matmul``.
    encoded_unpack_bytes_per_s
        Bytes of 16-bit output per second when encoded matrices are unpacked, by the name of their
        ``Kind``. What is not there is priced as groups of 4 bits.
    grouping_bytes_per_s
        Bytes of tokens per second, one row for each token and expert, that are sorted by expert
        before the experts' products and added up behind them. 0 where it is not known: it costs
        nothing.
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
    attention_one_query: Mapping[str, float] = field(default_factory=dict)
    attention_many_queries: Mapping[str, float] = field(default_factory=dict)
    attention_by_token: Mapping[str, float] = field(default_factory=dict)
    encoded_matmul: Mapping[str, RateCurve] = field(default_factory=dict)
    encoded_unpack_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    grouping_bytes_per_s: float = 0.0

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
            "unpack_bytes_per_s",
            "packed_attention_bytes_per_s",
            "sparse_attention_bytes_per_s",
            "unpack_8bit_bytes_per_s",
            "packed_attention_8bit_bytes_per_s",
            "grouping_bytes_per_s",
        ):
            require_not_negative(name, getattr(self, name))
        for name in ("attention_many_queries", "attention_by_token"):
            for bits, share in getattr(self, name).items():
                if not 0 < share <= 1:
                    raise InputError(f"{name}.{bits}", got=share, allowed="above 0, at most 1")
        for bits, times in self.attention_one_query.items():
            if not 1 <= times < float("inf"):
                raise InputError(f"attention_one_query.{bits}", got=times, allowed="1 or more")
        for name in ("encoded_matmul", "encoded_unpack_bytes_per_s"):
            for kind in getattr(self, name):
                if kind not in Kind.__members__:
                    known = ", ".join(Kind.__members__)
                    raise InputError(f"{name} of a kind of encoding", got=kind, allowed=known)
        for kind, rate in self.encoded_unpack_bytes_per_s.items():
            require_positive(f"encoded_unpack_bytes_per_s.{kind}", rate)

    def matmul_rate(self, dtype: str, rows: float, width: int, *, packed: bool = False) -> float:
        """Return the FLOP/s of a product of ``rows`` with weights [any, ``width``].

        An element of the result costs its ``width`` products and something besides, so that
        seconds per FLOP are linear in ``1 / width``; two widths were measured.
        """
        wide, narrow = self.matmul, self.narrow_matmul
        if packed:
            wide, narrow = self.packed_matmul, self.narrow_packed_matmul
        return 1 / (1 / wide[dtype].at(rows) + _narrowness_s(wide, narrow, dtype, rows, width))

    def multiplies_any_rows_packed(self, dtype: str) -> bool:
        """Whether any number of rows is multiplied by 4-bit weights without unpacking these."""
        curve = self.packed_matmul.get(dtype)
        return curve is not None and curve.sizes[-1] > DIRECT_ROWS

    def encoded_matmul_rate(self, kind: Kind, dtype: str, rows: float, width: int) -> float:
        """Return the FLOP/s of a product of ``rows`` with encoded weights [any, ``width``], which
        are decoded as they are multiplied.

        Decoding takes as long for any number of rows, so that the seconds of a product are linear
        in them. More rows than were measured take those of a plain product besides. Where products
        with few rows were never measured, all of the matrix is unpacked first.
        """
        plain = self.matmul[dtype]
        narrow_s = _narrowness_s(self.matmul, self.narrow_matmul, dtype, rows, width)
        curve = self.encoded_matmul.get(kind.name) or self._few_rows_packed(dtype)
        if curve is None:
            unpacked = self.encoded_unpack_rate(kind)
            # Two bytes of output are two FLOP of a row.
            wide_s = 1 / plain.at(rows) + (1 / unpacked / rows if unpacked else 0.0)
        elif rows <= curve.sizes[-1]:
            wide_s = _few_rows_s(curve, rows) / rows
        else:
            most, most_s = curve.sizes[-1], 1 / curve.rates[-1]
            # Our own product decodes again for each window of rows.
            at_once = min(rows, max(most, WINDOW_ROWS))
            decoding_s = max(0.0, most_s - 1 / plain.at(most)) * most / at_once
            wide_s = min(most_s, 1 / plain.at(rows) + decoding_s)
        return 1 / (wide_s + narrow_s)

    def _few_rows_packed(self, dtype: str) -> RateCurve | None:
        """Return the rates of products with our 4-bit weights and few rows: many rows are faster
        than with any encoding."""
        curve = self.packed_matmul.get(dtype)
        if curve is None or curve.sizes[-1] <= DIRECT_ROWS:
            return curve
        count = max(1, bisect.bisect_right(curve.sizes, DIRECT_ROWS))
        return RateCurve(sizes=curve.sizes[:count], rates=curve.rates[:count])

    def encoded_unpack_rate(self, kind: Kind) -> float:
        """Return the rate of unpacking encoded matrices; 0 where it is not known."""
        return self.encoded_unpack_bytes_per_s.get(kind.name) or self.unpack_bytes_per_s

    def unpack_rate(self, bits: int | None) -> float:
        """Return the rate of unpacking groups of ``bits``; 0 where it is not known."""
        eight = self.unpack_8bit_bytes_per_s if bits == 8 else 0.0
        return eight or self.unpack_bytes_per_s

    def attention_rate(self, dtype: str, bits: int | None, group_size: int, head_dim: int) -> float:
        """Return the rate of decode attention over a cache of ``bits``, ``None`` where it is not
        packed, in the bytes that it has unpacked.

        The queries of each element cost arithmetic, so that seconds per byte are linear in
        ``group_size / head_dim`` between the shapes that were measured, and beyond the last.
        """
        rate = self.attention_decode[dtype]
        if bits is not None:
            eight = self.packed_attention_8bit_bytes_per_s if bits == 8 else 0.0
            packed = eight or self.packed_attention_bytes_per_s
            # Without a kernel that reads it packed, it is unpacked first.
            rate = packed or 1 / (1 / rate + 1 / self.unpack_rate(bits))
        queries, key = group_size / head_dim, str(bits or FULL)
        one, few, many = 1 / HEAD_DIM, GROUP_SIZE / HEAD_DIM, MANY_QUERIES / SHORT_HEAD_DIM
        if queries > few:
            kept = self.attention_many_queries.get(key, 1.0)
            return rate / (1 + (queries - few) / (many - few) * (1 / kept - 1))
        kept = self.attention_one_query.get(key, 1.0)
        return rate / (1 + (few - max(queries, one)) / (few - one) * (1 / kept - 1))

    def over_tokens(self) -> ComputeRates:
        """Return these rates, with attention over a cache stored token by token. There the
        memory is waited for, however few the queries: measured in 4 bits, one for each key head
        takes as long as four."""
        kept = {bits: self.attention_by_token.get(bits, 1.0) for bits in (FULL, "8", "4")}
        return replace(
            self,
            attention_decode={d: rate * kept[FULL] for d, rate in self.attention_decode.items()},
            sparse_attention_bytes_per_s=self.sparse_attention_bytes_per_s * kept[FULL],
            packed_attention_bytes_per_s=self.packed_attention_bytes_per_s * kept["4"],
            packed_attention_8bit_bytes_per_s=self.packed_attention_8bit_bytes_per_s * kept["8"],
            attention_one_query={},
            attention_by_token={},
        )


def _narrowness_s(
    wide: Mapping[str, RateCurve],
    narrow: Mapping[str, RateCurve],
    dtype: str,
    rows: float,
    width: int,
) -> float:
    """Return the seconds that a FLOP takes longer with weights of ``width`` than with wide ones."""
    if dtype not in narrow:
        return 0.0
    # Where narrow weights were not measured with so few or many rows, the nearest count.
    sizes = narrow[dtype].sizes
    known = min(max(rows, sizes[0]), sizes[-1])
    added_s = max(0.0, 1 / narrow[dtype].at(known) - 1 / wide[dtype].at(known))
    share = (1 / width - 1 / WIDTH) / (1 / NARROW_WIDTH - 1 / WIDTH)
    return added_s * max(0.0, share)


def _few_rows_s(curve: RateCurve, rows: float) -> float:
    """Return the seconds that ``rows`` take for each FLOP of one row: linear between the numbers
    of rows that were measured."""
    seconds = [size / rate for size, rate in zip(curve.sizes, curve.rates, strict=True)]
    if rows <= curve.sizes[0]:
        return seconds[0] * rows / curve.sizes[0]
    i = max(1, bisect.bisect_left(curve.sizes, rows))
    share = (rows - curve.sizes[i - 1]) / (curve.sizes[i] - curve.sizes[i - 1])
    return (1 - share) * seconds[i - 1] + share * seconds[i]
