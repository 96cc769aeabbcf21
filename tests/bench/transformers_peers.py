"""Two peers of one library: transformers as it is, and with accelerate's disk offload."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from contest import Attempt
from workload_run import ROOT, Runs

from profiles.files import read_json
from profiles.units import format_bytes

# Accelerate's weights in memory, as shares of the limit, the usual best first.
SHARES = (0.25, 0.0, 0.5, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerate:
    """Whole layers on disk, read when they are needed, in one batch of all prompts."""

    runs: Runs
    max_memory: int | None = None
    name: str = "accelerate"

    def why_not(self) -> str | None:
        """Every model can be offloaded."""
        return None

    def prepare(self) -> None:
        """It reads the checkpoint as it is."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """List amounts of weights in memory.

        The most that it survives is often not its best: memory that holds weights is missing
        where files are mapped, and the files are then read again and again.
        """
        if self.max_memory is not None:
            return [{"max_memory_bytes": self.max_memory}]
        bench = self.runs.bench
        # The cache lies in memory too, so that more weights than this cannot be had.
        highest = max(0, bench.limit_bytes - bench.cache_bytes)
        sizes = [int(share * bench.limit_bytes) for share in SHARES]
        return [{"max_memory_bytes": size} for size in sizes if size <= highest]

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run in an empty offload folder."""
        with self.runs.bench.offload_folder(self.name) as offload:
            return _run(
                self.runs,
                self.name,
                timeout_s,
                "--max-memory",
                str(setting["max_memory_bytes"]),
                "--offload-dir",
                str(offload),
            )

    def version(self) -> str:
        """Both packages count."""
        return accelerate_version()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformers:
    """All in memory, for models that fit."""

    runs: Runs
    name: str = "transformers"

    def why_not(self) -> str | None:
        """Weights and cache alone must be below the limit; whether the rest is, a run tells."""
        bench = self.runs.bench
        needed = bench.weight_bytes + bench.cache_bytes
        if needed < bench.limit_bytes:
            return None
        return (
            f"weights and cache take {format_bytes(needed)},"
            f" the limit is {format_bytes(bench.limit_bytes)}"
        )

    def prepare(self) -> None:
        """It reads the checkpoint as it is."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """There is nothing to choose."""
        return [{}]

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run it as a user without a library for offloading would."""
        return _run(self.runs, self.name, timeout_s)

    def version(self) -> str:
        """Torch is told with the machine."""
        return f"transformers {version('transformers')}"


def accelerate_version() -> str:
    """Return the versions of both packages."""
    return f"accelerate {version('accelerate')}, transformers {version('transformers')}"


def _run(runs: Runs, name: str, timeout_s: float, *words: str) -> Attempt:
    bench = runs.bench
    output = bench.folder / f"{name}.json"
    output.unlink(missing_ok=True)
    ended = runs.limited(
        name,
        sys.executable,
        str(ROOT / "tests/bench/transformers_run.py"),
        "--model",
        str(bench.checkpoint),
        "--dtype",
        bench.model.dtype,
        "--prompts",
        str(bench.prompts),
        "--gen-len",
        str(bench.gen_len),
        "--output",
        str(output),
        *words,
        timeout_s=timeout_s,
    )
    if not ended.is_good:
        return Attempt(ended=ended)
    found = read_json(output, "figures")
    rates = runs.rates(ended, found.pop("prefill_s"), found.pop("decode_s"))
    return Attempt(ended=ended, figures=rates | found)
