"""Our side: measured, searched, and run under the limit by ``executor.bench``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contest import Attempt
from memory_cgroup import last_line
from workload_run import Runs, say

from executor.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from executor.expert_counts import counts_path, kept_skew
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """One policy for all rounds, priced in each on the machine as it was measured just before; with
    ``measures_once``, as it was measured before the first. ``model`` is a file that another system
    makes of the checkpoint.

    The folder with the weights at rest is kept between rounds, so that only the first one builds
    it: that is part of ``process_s`` and of neither phase.
    """

    runs: Runs
    quick_profile: bool = False
    measures_once: bool = False
    weight_bits: int | None = None
    model: Path | None = None
    name: str = "ours"

    def why_not(self) -> str | None:
        """An infeasible workload is the search's to tell."""
        return None

    @property
    def _offload(self) -> Path:
        return self.runs.bench.folder / f"offload-{self.name}"

    @property
    def _policy(self) -> Path:
        return self.runs.bench.folder / f"policy-{self.name}.json"

    def prepare(self) -> None:
        """Forget what an earlier command left."""
        shutil.rmtree(self._offload, ignore_errors=True)
        self._offload.mkdir()
        self._policy.unlink(missing_ok=True)
        self._counts.unlink(missing_ok=True)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """The search chooses."""
        return [{}]

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Measure and search outside the limit, run under it."""
        bench = self.runs.bench
        profile = self._measure()
        if not self._policy.exists():
            self._count(profile)
            self._search(profile)
        if self._counts.exists():
            # Not what the rounds before have counted: they had the same prompts.
            shutil.copy(self._counts, self._kept_counts())
        ended = self.runs.limited(
            self.name,
            sys.executable,
            "-m",
            "executor.bench",
            "--policy",
            str(self._policy),
            "--hardware",
            str(profile),
            "--model",
            str(self.model or bench.checkpoint),
            "--num-prompts",
            str(bench.num_prompts),
            "--seed",
            str(bench.seed),
            "--offload-dir",
            str(self._offload),
            # Greedy decoding of random weights repeats itself, and its experts with it.
            *(["--temperature", "1"] if self._has_experts else []),
            timeout_s=timeout_s,
        )
        if not ended.is_good:
            return Attempt(ended=ended)
        report = json.loads(last_line(self.runs.log(self.name)))
        found = HardwareProfile.load(profile)
        figures = {
            **report,
            **self.runs.rates(ended, report["prefill_s"], report["decode_s"]),
            "resident_peak_bytes": report["peak_bytes"]["cpu"],
            "estimated_peak_bytes": report["predicted_peak_bytes"]["cpu"],
            "disk_read_bytes_per_s": max(found.disk.read.rates),
            "memory_bytes_per_s": found.cpu.memory_bytes_per_s,
        }
        return Attempt(ended=ended, figures=figures)

    def _measure(self) -> Path:
        if self.measures_once and self._policy.exists():
            return self.runs.bench.folder / "profile.json"
        return measure(self.runs, self._offload, is_quick=self.quick_profile)

    @property
    def _has_experts(self) -> bool:
        return "experts" in self.runs.bench.model.component_names

    @property
    def _counts(self) -> Path:
        return self.runs.bench.folder / f"counts-{self.name}.json"

    def _source(self) -> OpenedCheckpoint:
        return open_checkpoint(self.model or self.runs.bench.checkpoint)

    def _kept_counts(self) -> Path:
        path = counts_path(self._source())
        assert path is not None
        return path

    def _count(self, profile: Path) -> None:
        """Count how often each expert is chosen, in two jobs with other prompts."""
        bench = self.runs.bench
        if not self._has_experts:
            return
        self._kept_counts().unlink(missing_ok=True)
        for number in (1, 2):
            say(f"counting experts, {number} of 2")
            self.runs.free(
                "count",
                "-m",
                "executor.bench",
                "--hardware",
                str(profile),
                "--model",
                str(self.model or bench.checkpoint),
                "--num-prompts",
                "64",
                "--prompt-len",
                "64",
                "--gen-len",
                "2",
                "--seed",
                str(bench.seed + number),
                "--offload-dir",
                str(self._offload),
                "--cpu-memory",
                f"{bench.budget_bytes}B",
            )
        shutil.copy(self._kept_counts(), self._counts)

    def _search(self, profile: Path) -> None:
        bench = self.runs.bench
        say("searching")
        self.runs.free(
            "search",
            "-m",
            "costmodel.search",
            "--hardware",
            str(profile),
            "--model",
            str(self.model or bench.checkpoint),
            "--num-prompts",
            str(bench.num_prompts),
            "--prompt-len",
            str(bench.prompt_len),
            "--gen-len",
            str(bench.gen_len),
            "--expert-skew",
            str(kept_skew(self._source())),
            "--cpu-memory",
            f"{bench.budget_bytes}B",
            "--output",
            str(self._policy),
            *(["--weight-bits", str(self.weight_bits)] if self.weight_bits else []),
        )

    def version(self) -> str:
        """Run from the checkout, it need not be installed."""
        return our_version()


def measure(runs: Runs, offload: Path, *, is_quick: bool) -> Path:
    """Measure the machine, and return the file of its profile."""
    profile = runs.bench.folder / "profile.json"
    say("measuring the machine")
    # With the whole limit: what a process takes by itself differs a little from measurement
    # to measurement, and a policy that was made for the budget must fit in all rounds.
    runs.free(
        "measure",
        "-m",
        "profiles.measure",
        "--cpu-memory",
        f"{runs.bench.limit_bytes}B",
        "--offload-dir",
        str(offload),
        "--output",
        str(profile),
        *(["--quick"] if is_quick else []),
    )
    return profile


def our_version() -> str:
    """Return the version of the package, where it is installed."""
    try:
        return f"zigzag-llm {version('zigzag-llm')}"
    except PackageNotFoundError:
        return "zigzag-llm, not installed"
