"""The peer: accelerate's disk offload, in padded cohorts that fit into memory one after another."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contest import Attempt
from drawn_job import DrawnJob
from job_bench import JobBench
from transformers_peers import accelerate_version
from workload_run import ROOT, Runs

from profiles.files import read_json

# Parts of the limit: weights in memory, and the cache of a cohort.
SETTINGS = ((0.25, 0.25), (0.0, 0.4), (0.4, 0.15))


@dataclass(slots=True, kw_only=True)
class AccelerateJob:
    """Whole layers on disk, read once a pass, in cohorts of similar lengths.

    ``passes``: of each cohort; the seconds of its other passes are those of the ones that ran.
    """

    runs: Runs
    job: DrawnJob
    passes: int
    name: str = "accelerate"

    def why_not(self) -> str | None:
        """Every model can be offloaded."""
        return None

    def prepare(self) -> None:
        """It reads the checkpoint as it is."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """List how memory is shared by weights and cache."""
        bench = self.runs.bench
        assert isinstance(bench, JobBench)
        limit = bench.limit_bytes
        return [
            {
                "max_memory_bytes": int(weights * limit),
                "cohort_tokens": int(cache * limit / bench.token_bytes),
            }
            for weights, cache in SETTINGS
        ]

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run the cohorts in one process, with an empty offload folder."""
        bench = self.runs.bench
        cohorts = padded_cohorts(self.job, setting["cohort_tokens"])
        prompts, output = bench.folder / f"{self.name}.jsonl", bench.folder / f"{self.name}.json"
        with prompts.open("w", encoding="utf-8") as handle:
            for cohort in cohorts:
                told = {"prompts": cohort.prompts, "passes": cohort.longest_answer}
                handle.write(json.dumps(told) + "\n")
        output.unlink(missing_ok=True)
        with bench.offload_folder(self.name) as offload:
            ended = self.runs.limited(
                self.name,
                *(sys.executable, str(ROOT / "tests/bench/transformers_job_run.py")),
                *("--model", str(bench.checkpoint), "--dtype", bench.model.dtype),
                *("--cohorts", str(prompts), "--most-passes", str(self.passes)),
                *("--max-memory", str(setting["max_memory_bytes"])),
                *("--offload-dir", str(offload), "--output", str(output)),
                timeout_s=timeout_s,
            )
        if not ended.is_good:
            return Attempt(ended=ended)
        found = read_json(output, "figures")
        figures = {
            "run_s": found["run_s"],
            "tok_per_s": self.job.num_tokens / found["run_s"],
            "is_extrapolated": found["is_extrapolated"],
            "cohorts": len(cohorts),
            "passes": sum(cohort.longest_answer for cohort in cohorts),
            "process_s": ended.wall_s,
            "cgroup_peak_bytes": ended.peak_bytes,
        }
        return Attempt(ended=ended, figures=figures)

    def version(self) -> str:
        """Both packages count."""
        return accelerate_version()


def padded_cohorts(job: DrawnJob, tokens: int) -> list[DrawnJob]:
    """Cut a job into cohorts by length; padded to its longest prompt and its longest answer, each
    has at most so many tokens, or a single prompt."""
    pairs = zip(job.prompts, job.answers, strict=True)
    lengths = [len(ids) + answer for ids, answer in pairs]
    cohorts: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        grown = job.only([*cohorts[-1], number]) if cohorts else None
        if grown and _padded_tokens(grown) <= tokens:
            cohorts[-1].append(number)
        else:
            cohorts.append([number])
    return [job.only(cohort) for cohort in cohorts]


def _padded_tokens(job: DrawnJob) -> int:
    return len(job.prompts) * (job.longest_prompt + job.longest_answer)
