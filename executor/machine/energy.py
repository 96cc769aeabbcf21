"""The energy that a machine has taken, where it tells."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# Counters of a processor begin again after some 200 kJ, so they are read in between.
SECONDS = 60.0


class EnergyMeter:
    """Joules of processors (RAPL) and GPUs (NVML) within the block of a context manager.

    Most systems let only the administrator read the counters of processors. What cannot be read is
    not counted.

    Parameters
    ----------
    has_gpu
        Whether GPUs are counted.
    folder
        With the counters of processors.
    """

    def __init__(self, *, has_gpu: bool = False, folder: Path = POWERCAP) -> None:
        self._counters = {**_processors(folder), **(_gpus() if has_gpu else {})}
        self._last: dict[str, float] = {}
        self._joules: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> EnergyMeter:
        self._last = {name: read() for name, (read, _) in self._counters.items()}
        self._joules = dict.fromkeys(self._counters, 0.0)
        if self._counters:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._counters:
            self._thread.join()

    @property
    def joules(self) -> dict[str, float]:
        """Joules so far by part of the machine, such as ``package-0``; empty if nothing tells."""
        return dict(self._joules)

    def sample(self) -> None:
        """Read the counters."""
        for name, (read, span) in self._counters.items():
            with contextlib.suppress(OSError, ValueError):
                now = read()
                taken = now - self._last[name]
                # The counter has begun again.
                self._joules[name] += taken if taken >= 0 else taken + span
                self._last[name] = now

    def _watch(self) -> None:
        while not self._is_over.wait(SECONDS):
            self.sample()
        self.sample()


# Reads joules, and after how many the counter begins again.
Counter = tuple[Callable[[], float], float]


def _processors(folder: Path) -> dict[str, Counter]:
    found: dict[str, Counter] = {}
    # A name with two colons is a part of another.
    for zone in sorted(folder.glob("*:*")):
        if zone.name.count(":") != 1:
            continue
        with contextlib.suppress(OSError, ValueError):
            span = _joules_in(zone / "max_energy_range_uj")
            path = zone / "energy_uj"
            _joules_in(path)
            name = (zone / "name").read_text(encoding="ascii").strip()
            found[name] = partial(_joules_in, path), span
    return found


def _joules_in(path: Path) -> float:
    return int(path.read_text(encoding="ascii")) / 1e6


def _gpus() -> dict[str, Counter]:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    # The library has errors of its own, and may be absent or too old.
    except Exception:
        return {}
    return {
        f"gpu-{number}": (partial(_joules_of, nvml, handle), 0.0)
        for number, handle in enumerate(handles)
    }


def _joules_of(nvml: Any, handle: object) -> float:
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
