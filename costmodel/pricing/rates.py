"""The rates of a machine by name, with functions that read and scale them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from profiles.compute_rates import ComputeRates
from profiles.hardware import HardwareProfile, Link
from profiles.rate_curve import RateCurve

Scale = Callable[[HardwareProfile, float], HardwareProfile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One rate of a machine.

    Parameters
    ----------
    unit, unit_size
        The unit for people, and its size in bytes, FLOP or layers a second.
    value
        The rate at its best size, in bytes, FLOP or layers a second; 0 where the machine lacks it.
    scale
        Returns the machine with the rate times a factor, at every size and dtype.
    """

    unit: str
    unit_size: float
    value: Callable[[HardwareProfile], float]
    scale: Scale


def _curve(curve: RateCurve, factor: float) -> RateCurve:
    return replace(curve, rates=tuple(rate * factor for rate in curve.rates))


def _all(rates: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: rate * factor for name, rate in rates.items()}


def _link(link: Link, factor: float) -> Link:
    return Link(
        pinned_bytes_per_s=link.pinned_bytes_per_s * factor,
        pageable_bytes_per_s=link.pageable_bytes_per_s * factor,
        opposed_bytes_per_s=link.opposed_bytes_per_s * factor,
    )


def _matmul(rates: ComputeRates, factor: float) -> ComputeRates:
    return replace(
        rates,
        matmul={d: _curve(c, factor) for d, c in rates.matmul.items()},
        packed_matmul={d: _curve(c, factor) for d, c in rates.packed_matmul.items()},
        narrow_matmul={d: _curve(c, factor) for d, c in rates.narrow_matmul.items()},
        narrow_packed_matmul={d: _curve(c, factor) for d, c in rates.narrow_packed_matmul.items()},
        encoded_matmul={kind: _curve(c, factor) for kind, c in rates.encoded_matmul.items()},
        grouping_bytes_per_s=rates.grouping_bytes_per_s * factor,
    )


def _attention(rates: ComputeRates, factor: float) -> ComputeRates:
    return replace(
        rates,
        attention_prefill=_all(rates.attention_prefill, factor),
        attention_decode=_all(rates.attention_decode, factor),
        packed_attention_bytes_per_s=rates.packed_attention_bytes_per_s * factor,
        packed_attention_8bit_bytes_per_s=rates.packed_attention_8bit_bytes_per_s * factor,
        sparse_attention_bytes_per_s=rates.sparse_attention_bytes_per_s * factor,
    )


def _unpacking(rates: ComputeRates, factor: float) -> ComputeRates:
    return replace(
        rates,
        unpack_bytes_per_s=rates.unpack_bytes_per_s * factor,
        unpack_8bit_bytes_per_s=rates.unpack_8bit_bytes_per_s * factor,
        encoded_unpack_bytes_per_s=_all(rates.encoded_unpack_bytes_per_s, factor),
    )


def _tasks(rates: ComputeRates, factor: float) -> ComputeRates:
    return replace(rates, task_overhead_s=rates.task_overhead_s / factor)


def _on_gpu(change: Callable[[ComputeRates, float], ComputeRates]) -> Scale:
    def scale(hardware: HardwareProfile, factor: float) -> HardwareProfile:
        if hardware.gpu is None:
            return hardware
        compute = change(hardware.gpu.compute, factor)
        return replace(hardware, gpu=replace(hardware.gpu, compute=compute))

    return scale


def _on_cpu(change: Callable[[ComputeRates, float], ComputeRates]) -> Scale:
    def scale(hardware: HardwareProfile, factor: float) -> HardwareProfile:
        compute = change(hardware.cpu.compute, factor)
        return replace(hardware, cpu=replace(hardware.cpu, compute=compute))

    return scale


def _of_link(direction: str) -> Scale:
    def scale(hardware: HardwareProfile, factor: float) -> HardwareProfile:
        if hardware.gpu is None:
            return hardware
        link: Link = getattr(hardware.gpu, direction)
        # replace() takes the field's name as a keyword.
        changed = {direction: _link(link, factor)}
        return replace(hardware, gpu=replace(hardware.gpu, **changed))  # type: ignore[arg-type]

    return scale


def _of_disk(direction: str) -> Scale:
    def scale(hardware: HardwareProfile, factor: float) -> HardwareProfile:
        changed = {direction: _curve(getattr(hardware.disk, direction), factor)}
        return replace(hardware, disk=replace(hardware.disk, **changed))  # type: ignore[arg-type]

    return scale


def _of_memory(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    rate = hardware.cpu.memory_bytes_per_s * factor
    return replace(hardware, cpu=replace(hardware.cpu, memory_bytes_per_s=rate))


def _best_matmul(rates: ComputeRates | None) -> float:
    return max(curve.peak for curve in rates.matmul.values()) if rates else 0.0


def _best_attention(rates: ComputeRates | None) -> float:
    return max(rates.attention_decode.values()) if rates else 0.0


def with_one_dtype(hardware: HardwareProfile, dtype: str) -> HardwareProfile:
    """Return a machine that knows the arithmetic of one dtype only, if it knows that dtype."""

    def kept(rates: ComputeRates) -> ComputeRates:
        if dtype not in rates.matmul:
            return rates
        of_dtype: dict[str, Any] = {}
        for field in fields(rates):
            table = getattr(rates, field.name)
            if isinstance(table, Mapping) and rates.matmul.keys() & table.keys():
                of_dtype[field.name] = {k: value for k, value in table.items() if k == dtype}
        return replace(rates, **of_dtype)

    gpu = hardware.gpu and replace(hardware.gpu, compute=kept(hardware.gpu.compute))
    return replace(hardware, gpu=gpu, cpu=replace(hardware.cpu, compute=kept(hardware.cpu.compute)))


def _gpu_compute(hardware: HardwareProfile) -> ComputeRates | None:
    return hardware.gpu.compute if hardware.gpu else None


def _bandwidth(value: Callable[[HardwareProfile], float], scale: Scale) -> Rate:
    return Rate(unit="GB/s", unit_size=1e9, value=value, scale=scale)


def _arithmetic(value: Callable[[HardwareProfile], float], scale: Scale) -> Rate:
    return Rate(unit="TFLOP/s", unit_size=1e12, value=value, scale=scale)


def _tasks_per_s(value: Callable[[HardwareProfile], ComputeRates | None], scale: Scale) -> Rate:
    def rate(hardware: HardwareProfile) -> float:
        rates = value(hardware)
        return 1 / rates.task_overhead_s if rates and rates.task_overhead_s else 0.0

    return Rate(unit="layers/s", unit_size=1.0, value=rate, scale=scale)


RATES: Mapping[str, Rate] = {
    "disk_read": _bandwidth(lambda h: h.disk.read.peak, _of_disk("read")),
    "disk_write": _bandwidth(lambda h: h.disk.write.peak, _of_disk("write")),
    "h2d": _bandwidth(lambda h: h.gpu.h2d.pinned_bytes_per_s if h.gpu else 0.0, _of_link("h2d")),
    "d2h": _bandwidth(lambda h: h.gpu.d2h.pinned_bytes_per_s if h.gpu else 0.0, _of_link("d2h")),
    "cpu_memory": _bandwidth(lambda h: h.cpu.memory_bytes_per_s, _of_memory),
    "gpu_matmul": _arithmetic(lambda h: _best_matmul(_gpu_compute(h)), _on_gpu(_matmul)),
    "gpu_attention": _bandwidth(lambda h: _best_attention(_gpu_compute(h)), _on_gpu(_attention)),
    "gpu_unpack": _bandwidth(
        lambda h: h.gpu.compute.unpack_bytes_per_s if h.gpu else 0.0, _on_gpu(_unpacking)
    ),
    "cpu_matmul": _arithmetic(lambda h: _best_matmul(h.cpu.compute), _on_cpu(_matmul)),
    "cpu_attention": _bandwidth(lambda h: _best_attention(h.cpu.compute), _on_cpu(_attention)),
    "cpu_unpack": _bandwidth(lambda h: h.cpu.compute.unpack_bytes_per_s, _on_cpu(_unpacking)),
    # Layers a second where the fixed cost of a layer is all of it.
    "gpu_tasks": _tasks_per_s(_gpu_compute, _on_gpu(_tasks)),
    "cpu_tasks": _tasks_per_s(lambda h: h.cpu.compute, _on_cpu(_tasks)),
}
