"""A hardware profile as text for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from profiles.compute_rates import ComputeRates
from profiles.hardware import HardwareProfile, Link
from profiles.rate_curve import RateCurve
from profiles.units import format_bytes, format_flop_rate, format_rate, format_seconds

# Spreads beyond this are marked: the machine was busy, or its clock moves.
NOISY_SPREAD = 0.15
COLUMN = 24


def format_profile(profile: HardwareProfile) -> str:
    """Lay out capacities and rates; medians with their spread where samples were kept."""
    table = _ProfileTable(profile)
    lines = [f"{profile.name}  ({profile.source}, {profile.date})", ""]
    lines += table.capacities()
    if profile.gpu is not None:
        gpu = profile.gpu
        lines += ["", "link to the GPU", *table.links(gpu.h2d, gpu.d2h)]
        # An emulated GPU computes at the CPU's rates, which are told below.
        if not gpu.emulated:
            lines += ["", f"GPU: {gpu.name}"]
            lines += table.compute("gpu", gpu.compute, gpu.memory_bytes_per_s)
    cpu = profile.cpu
    lines += ["", f"CPU: {cpu.name}, {cpu.num_cores} cores"]
    lines += table.compute("cpu", cpu.compute, cpu.memory_bytes_per_s)
    lines += ["", "disk, past the page cache", *table.disk(profile.disk.read, profile.disk.write)]
    lines += table.contention()
    lines += table.fits()
    if table.is_noisy:
        lines += ["", f"! spread above {NOISY_SPREAD:.0%}: was the machine busy?"]
    return "\n".join(lines)


def _row(label: str, *cells: str) -> str:
    return f"  {label:<24}" + "".join(f"{cell:<{COLUMN}}" for cell in cells).rstrip()


def _encoded_rows(rates: ComputeRates) -> list[str]:
    """Tell of the slowest and the fastest kind: there are many, and they differ little."""
    curves = rates.encoded_matmul
    sizes = sorted({size for curve in curves.values() for size in curve.sizes})
    rows = []
    for size in sizes:
        found = {kind: curve.at(size) for kind, curve in curves.items()}
        rows.append(_row(f"encoded, {size:.0f} rows", *_ends(found, format_flop_rate)))
    if unpacked := rates.encoded_unpack_bytes_per_s:
        rows.append(_row("unpack encoded", *_ends(unpacked, format_rate)))
    return rows


def _ends(found: Mapping[str, float], told: Callable[[float], str]) -> list[str]:
    ends = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    return [f"{kind} {told(found[kind])}" for kind in ends]


class _ProfileTable:
    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._spreads = {m.name: m.spread for m in profile.measurements}
        self.is_noisy = False

    def capacities(self) -> list[str]:
        profile = self._profile
        runtime = f"(an empty process holds {format_bytes(profile.cpu.runtime_bytes)})"
        rows = [
            _row("CPU memory", f"{format_bytes(profile.cpu.memory_bytes)} {runtime}"),
            _row("disk free", format_bytes(profile.disk.free_bytes)),
        ]
        if profile.gpu is None:
            return [_row("GPU memory", "none: the CPU computes"), *rows]
        memory = f"{format_bytes(profile.gpu.memory_bytes)} ({profile.gpu.name})"
        return [_row("GPU memory", memory), *rows]

    def links(self, h2d: Link, d2h: Link) -> list[str]:
        rows = [_row("", "host to device", "device to host")]
        for kind in ("pinned", "pageable", "opposed"):
            cells = [
                self._with_spread(
                    format_rate(getattr(link, f"{kind}_bytes_per_s")), f"link.{name}.{kind}"
                )
                for name, link in (("h2d", h2d), ("d2h", d2h))
            ]
            label = "pinned, both ways" if kind == "opposed" else kind
            rows.append(_row(label, *cells))
        return rows

    def compute(self, prefix: str, rates: ComputeRates, memory_bytes_per_s: float) -> list[str]:
        overhead = format_seconds(rates.task_overhead_s)
        rows = [
            _row(
                "memory read",
                self._with_spread(format_rate(memory_bytes_per_s), f"{prefix}.memory.read"),
            ),
            _row("cost of a layer", self._with_spread(overhead, f"{prefix}.task_overhead")),
            _row("", *rates.matmul),
        ]
        rows += self._products(prefix, "matmul", "matmul", rates.matmul)
        rows += self._products(prefix, "matmul.narrow", "narrow", rates.narrow_matmul)
        prefill = [
            self._with_spread(
                format_flop_rate(rates.attention_prefill[d]), f"{prefix}.attention_prefill.{d}"
            )
            for d in rates.matmul
        ]
        decode = [
            self._with_spread(
                format_rate(rates.attention_decode[d]), f"{prefix}.attention_decode.{d}"
            )
            for d in rates.matmul
        ]
        rows += [_row("attention, prefill", *prefill), _row("attention, decode", *decode)]
        for label, figure, rate in (
            ("unpack 4 bits", "unpack.4bit", rates.unpack_bytes_per_s),
            ("unpack 8 bits", "unpack.8bit", rates.unpack_8bit_bytes_per_s),
            ("attention, 4 bits", "attention_decode.4bit", rates.packed_attention_bytes_per_s),
            ("attention, 8 bits", "attention_decode.8bit", rates.packed_attention_8bit_bytes_per_s),
            ("attention, a tenth", "attention_decode.sparse", rates.sparse_attention_bytes_per_s),
            ("group by expert", "grouping", rates.grouping_bytes_per_s),
        ):
            if rate > 0:
                cell = self._with_spread(format_rate(rate), f"{prefix}.{figure}")
                rows.append(_row(label, cell))
        for label, factors in (
            ("one query makes", rates.attention_one_query),
            ("many queries keep", rates.attention_many_queries),
            ("token by token keeps", rates.attention_by_token),
        ):
            if factors:
                cells = (f"{bits}: {factor:.0%}" for bits, factor in factors.items())
                rows.append(_row(label, *cells))
        packed, narrow = rates.packed_matmul, rates.narrow_packed_matmul
        rows += self._products(prefix, "packed_matmul", "4 bits", packed)
        rows += self._products(prefix, "packed_matmul.narrow", "4 bits narrow", narrow)
        return rows + _encoded_rows(rates)

    def _products(
        self, prefix: str, figure: str, label: str, curves: Mapping[str, RateCurve]
    ) -> list[str]:
        return [
            _row(
                f"{label}, {size:.0f} rows",
                *(
                    self._curve_cell(curve, size, f"{prefix}.{figure}.{dtype}.rows{size:.0f}")
                    for dtype, curve in curves.items()
                ),
            )
            for size in sorted({size for curve in curves.values() for size in curve.sizes})
        ]

    def disk(self, read: RateCurve, write: RateCurve) -> list[str]:
        rows = [_row("", "read", "write")]
        for size in sorted({*read.sizes, *write.sizes}):
            cells = [
                format_rate(curve.rates[curve.sizes.index(size)]) if size in curve.sizes else "-"
                for curve in (read, write)
            ]
            rows.append(_row(f"{format_bytes(size)} requests", *cells))
        return rows

    def contention(self) -> list[str]:
        if not self._profile.contention:
            return []
        rows = [
            f"  {c.first} beside {c.second}: they keep {c.first_keeps:.0%} and"
            f" {c.second_keeps:.0%} of their rates"
            for c in self._profile.contention
        ]
        return ["", "channels beside each other", *rows]

    def fits(self) -> list[str]:
        profile = self._profile
        rows = []
        if profile.unhidden_share > 0:
            rows.append(f"  {profile.unhidden_share:.1%} of the other channels' time is not hidden")
        for fit in profile.calibrations:
            factors = ", ".join(f"{name} x {factor:.3f}" for name, factor in fit.factors.items())
            rows.append(f"  {fit.date}, {fit.source}: {factors}")
        return ["", "fitted to measured runs", *rows] if rows else []

    def _curve_cell(self, curve: RateCurve, size: float, name: str) -> str:
        if size not in curve.sizes:
            return "-"
        return self._with_spread(format_flop_rate(curve.rates[curve.sizes.index(size)]), name)

    def _with_spread(self, figure: str, name: str) -> str:
        spread = self._spreads.get(name)
        if spread is None:
            return figure
        is_noisy = spread > NOISY_SPREAD
        self.is_noisy = self.is_noisy or is_noisy
        return f"{figure} +-{spread:.0%}{' !' if is_noisy else ''}"
