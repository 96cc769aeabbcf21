"""Our side of a drawn job: over lanes, and in lockstep, as one block or as cohorts of like lengths.

All run ``executor.generate`` on a batch file. Lockstep that would take hours is only predicted.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contest import Attempt
from drawn_job import DrawnJob
from memory_cgroup import Ended, last_line
from ours import measure, our_version
from workload_run import Runs, say

from costmodel.plan.policy import Policy
from costmodel.pricing.price import block_seconds
from profiles.errors import RunError
from profiles.hardware import HardwareProfile


@dataclass(slots=True, kw_only=True)
class OurJob:
    """Our side. The machine is measured, and policies are searched, before the first round.

    Parameters
    ----------
    cohorts
        Jobs that run one after another in lockstep; ``None``: over lanes.
    policy
        A policy over lanes; default: ``generate`` searches one.
    shares_prefixes
        Whether lanes compute once what prompts begin with in common.
    longest_s
        Lockstep that is predicted to take longer is not run.
    """

    runs: Runs
    job: DrawnJob
    name: str
    cohorts: int | None = None
    policy: Path | None = None
    shares_prefixes: bool = True
    longest_s: float = 3600.0
    quick_profile: bool = False

    def why_not(self) -> str | None:
        """An infeasible workload is the search's to tell."""
        return None

    @property
    def _offload(self) -> Path:
        return self.runs.bench.folder / f"offload-{self.name}"

    @property
    def _profile(self) -> Path:
        return self.runs.bench.folder / "profile.json"

    def prepare(self) -> None:
        """Measure the machine, unless another of ours has."""
        shutil.rmtree(self._offload, ignore_errors=True)
        self._offload.mkdir()
        for path in self.runs.bench.folder.glob(f"policy-{self.name}-*.json"):
            path.unlink()
        if not self._profile.exists():
            measure(self.runs, self._offload, is_quick=self.quick_profile)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """The search chooses."""
        return [{}]

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run all parts of the job, or predict them."""
        if self.cohorts is None:
            return self._run_parts([(self.job, self.policy)], timeout_s)
        parts: list[tuple[DrawnJob, Path | None]] = []
        predicted_s = 0.0
        for number, cohort in enumerate(self.job.cohorts(self.cohorts)):
            path = self._search(cohort, number)
            predicted_s += lockstep_seconds(cohort, path, self._profile)
            parts.append((cohort, path))
        if predicted_s <= self.longest_s:
            return self._run_parts(parts, timeout_s, predicted_s)
        say(f"  predicted {predicted_s:.0f} s: not run")
        nothing = Ended(
            status=0, wall_s=0.0, peak_bytes=None, was_killed_for_memory=False, last_words=""
        )
        told = {"run_s": predicted_s, "tok_per_s": self.job.num_tokens / predicted_s}
        return Attempt(ended=nothing, figures=told | {"is_predicted_only": True})

    def version(self) -> str:
        """Run from the checkout, it need not be installed."""
        return our_version()

    def _run_parts(
        self,
        parts: Sequence[tuple[DrawnJob, Path | None]],
        timeout_s: float,
        predicted_s: float | None = None,
    ) -> Attempt:
        reports, walls, peaks = [], 0.0, [0]
        for job, policy in parts:
            ended, report = self._generate(job, policy, timeout_s)
            if report is None:
                return Attempt(ended=ended)
            reports.append(report)
            walls += ended.wall_s
            peaks.append(ended.peak_bytes or 0)
        run_s = sum(_seconds(report) for report in reports)
        predicted_s = predicted_s or sum(_seconds(report, "predicted_") for report in reports)
        figures = {
            "run_s": run_s,
            "tok_per_s": self.job.num_tokens / run_s,
            "predicted_tok_per_s": self.job.num_tokens / predicted_s,
            "process_s": walls,
            "cgroup_peak_bytes": max(peaks),
            "reports": reports,
        }
        return Attempt(ended=replace(ended, wall_s=walls), figures=figures)

    def _generate(
        self, job: DrawnJob, policy: Path | None, timeout_s: float
    ) -> tuple[Ended, dict[str, Any] | None]:
        bench = self.runs.bench
        prompts, output = bench.folder / f"{self.name}.jsonl", bench.folder / f"{self.name}.out"
        job.write(prompts)
        for path in (output, output.with_name(f"{output.name}.job")):
            path.unlink(missing_ok=True)
        chosen = ["--policy", str(policy)] if policy else ["--cpu-memory", f"{bench.budget_bytes}B"]
        if not self.shares_prefixes:
            chosen.append("--no-shared-prefixes")
        ended = self.runs.limited(
            self.name,
            *(sys.executable, "-m", "executor.generate", "--json"),
            *("--model", str(bench.checkpoint), "--hardware", str(self._profile)),
            *("--prompts", str(prompts), "--output", str(output)),
            *("--offload-dir", str(self._offload), *chosen),
            timeout_s=timeout_s,
        )
        if not ended.is_good:
            return ended, None
        _check_answers(job, output)
        report: dict[str, Any] = json.loads(last_line(self.runs.log(self.name)))
        # It names files of this machine.
        del report["sampling"]
        return ended, report

    def _search(self, job: DrawnJob, number: int) -> Path:
        bench = self.runs.bench
        path = bench.folder / f"policy-{self.name}-{number}.json"
        if not path.exists():
            self.runs.free(
                "search",
                *("-m", "costmodel.search", "--hardware", str(self._profile)),
                *("--model", str(bench.checkpoint), "--num-prompts", str(len(job.prompts))),
                *("--prompt-len", str(job.longest_prompt), "--gen-len", str(job.longest_answer)),
                *("--cpu-memory", f"{bench.budget_bytes}B", "--output", str(path)),
            )
        return path


def _seconds(report: Mapping[str, Any], prefix: str = "") -> float:
    """Add up the phases of a run: one over lanes, prefill and decode in lockstep."""
    phases = ("run",) if f"{prefix}run_s" in report else ("prefill", "decode")
    return float(sum(report[f"{prefix}{phase}_s"] for phase in phases))


def lockstep_seconds(job: DrawnJob, policy: Path, profile: Path) -> float:
    """Predict a job in lockstep: blocks by length of the prompts, each to its longest answer."""
    found, hardware = Policy.load(policy), HardwareProfile.load(profile)
    order = sorted(range(len(job.prompts)), key=lambda i: -len(job.prompts[i]))
    seconds = 0.0
    for first in range(0, len(order), found.block_size):
        part = job.only(order[first : first + found.block_size])
        workload = replace(
            found.workload,
            prompt_len=part.longest_prompt,
            gen_len=part.longest_answer,
            num_prompts=len(part.prompts),
            lengths=None,
        )
        seconds += block_seconds(replace(found, workload=workload, lanes=None), hardware)
    return seconds


def _check_answers(job: DrawnJob, output: Path) -> None:
    """Refuse a run that made another number of tokens than all others make."""
    with output.open(encoding="utf-8") as handle:
        bodies = [json.loads(line)["response"]["body"] for line in handle]
    num_tokens = sum(body["usage"]["completion_tokens"] for body in bodies)
    if (len(bodies), num_tokens) != (len(job.prompts), job.num_tokens):
        raise RunError(f"{len(bodies)} answers of {num_tokens} tokens, not {job.num_tokens}")
