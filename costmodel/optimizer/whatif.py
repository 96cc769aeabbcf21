"""Searches on changed machines: the gain of more memory or faster parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.optimizer.optimum import Search, SearchResult
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.rates import RATES
from profiles.hardware import HardwareProfile
from profiles.units import GIB, format_bytes

# A capacity below 16 GiB grows by the largest power of two within its half. Nothing grows by 8 GiB.
MORE_BYTES = 8 * GIB
TWICE_AS_FAST = {
    "disk_read": ("twice the disk's rates", ("disk_read", "disk_write")),
    "h2d": ("twice the link's rates", ("h2d", "d2h")),
    "gpu_matmul": ("a GPU that computes twice as fast", ("gpu_matmul", "gpu_attention")),
    "cpu_matmul": ("a CPU that computes twice as fast", ("cpu_matmul", "cpu_attention")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A machine with one change, and the throughput of its own best policy."""

    what: str
    job_tok_per_s: float


def what_would_change(
    search: Search, result: SearchResult, *, permitted: Permitted = DEFAULT_PERMITTED
) -> list[Change]:
    """Search again with more of each memory and with twice each rate, one at a time.

    ``result`` is the result of ``search`` on its machine. Each throughput is within
    ``NEARLY_AS_FAST`` of the machine's best.
    """
    return [
        Change(what=what, job_tok_per_s=search.on(machine, result).run(permitted).job_tok_per_s)
        for what, machine in _machines(search.hardware)
    ]


def _machines(hardware: HardwareProfile) -> Iterator[tuple[str, HardwareProfile]]:
    for tier, capacity in capacities(hardware).items():
        name = "disk" if tier == "disk" else f"{tier.upper()} memory"
        half = capacity // 2 or MORE_BYTES
        more = min(MORE_BYTES, 1 << half.bit_length() - 1)
        larger = with_capacities(hardware, {tier: capacity + more})
        yield f"{format_bytes(more)} more {name}", larger
    for first, (what, names) in TWICE_AS_FAST.items():
        if not RATES[first].value(hardware):
            continue
        machine = hardware
        for name in names:
            machine = RATES[name].scale(machine, 2.0)
        yield what, machine
