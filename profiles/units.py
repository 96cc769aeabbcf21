"""Bytes, rates and durations in text. GB is 10^9 bytes and GiB is 2^30 bytes."""

from __future__ import annotations

import math
import re

from profiles.errors import InputError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)?\s*")
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(s|min|h)?\s*")


def parse_bytes(text: str, what: str = "size") -> int:
    """Read ``16GiB``, ``4.0GB``, ``512MiB`` or ``8589934592B``.

    ``8`` might mean 8 GiB, so only 0 needs no unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match.group(2) or "B").upper() not in _FACTORS:
        raise InputError(what, got=repr(text), allowed="a size such as 8GiB, 8GB or 8589934592B")
    number, unit = match.groups()
    if unit is None and float(number) != 0:
        raise InputError(
            what,
            got=f"{text.strip()!r} without a unit",
            allowed="a size such as 8GiB or 8GB",
            hint=f"{number}GiB, or {number}B for bytes",
        )
    size = float(number) * _FACTORS[(unit or "B").upper()]
    if not math.isfinite(size):
        raise InputError(what, got=f"{text.strip()[:20]!r}...", allowed="a finite size")
    return int(size)


def parse_seconds(text: str, what: str = "duration") -> float:
    """Read ``600s``, ``10min``, ``2h`` or plain seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InputError(what, got=repr(text), allowed="a duration such as 600s, 10min or 2h")
    return float(match.group(1)) * {"s": 1, "min": 60, "h": 3600}[match.group(2) or "s"]


def format_bytes(num_bytes: float) -> str:
    """Format bytes in binary units with three significant digits: ``3.73 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{_digits(value)} {unit}"
        value /= 1024
    return f"{_digits(value)} TiB"


def format_rate(bytes_per_s: float) -> str:
    """Format a bandwidth in decimal GB/s, the unit of data sheets."""
    return f"{_digits(bytes_per_s / 1e9)} GB/s"


def format_flop_rate(flop_per_s: float) -> str:
    """Format an arithmetic rate in GFLOP/s or TFLOP/s."""
    if flop_per_s >= 1e12:
        return f"{_digits(flop_per_s / 1e12)} TFLOP/s"
    return f"{_digits(flop_per_s / 1e9)} GFLOP/s"


def format_seconds(seconds: float) -> str:
    """Format a duration: ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if seconds == 0:
        return "0 s"
    if seconds < 1e-3:
        return f"{_digits(seconds * 1e6)} us"
    if seconds < 1:
        return f"{_digits(seconds * 1e3)} ms"
    if seconds < 100:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(number: int, what: str) -> str:
    """Format a number of things: ``1 batch``, ``2 batches``."""
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number} {what}{ending}"


def _digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 3)}f}"


def format_figure(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits and no exponent; large ones are whole."""
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    # "#" keeps zeros at the end, and the point behind a whole number.
    return f"{value:#.{digits}g}".rstrip(".")
