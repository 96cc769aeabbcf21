"""What tests/bench/gpu.py does, step by step; each step is one line of the result."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_cases import GpuCase
from gpu_children import OFFLOAD, Children, Peer
from memory_cgroup import last_line
from workload_run import ROOT, say

from costmodel.families import preset_config, spec_from_config
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import Search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.price import estimate
from costmodel.pricing.problem import Problem
from profiles.emulate import EmulatedGpu
from profiles.errors import RunError
from profiles.files import read_json, to_json, write_json
from profiles.hardware import HardwareProfile

TESTS_S, PROFILE_S = 120.0, 190.0
# Tests share the GPU and its memory in few processes.
CORES_PER_PROCESS = 2
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?)")
# Of an emulated GPU, in a rehearsal.
LINK_BYTES_PER_S = 4e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: its name, that of its case (or its own), and the seconds that it is given."""

    name: str
    case: str
    seconds: float
    do: Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSteps:
    """The steps of the benchmark, and the folder in which they leave what the next one needs."""

    children: Children
    cases: Mapping[str, GpuCase]
    rehearses: bool

    @property
    def folder(self) -> Path:
        """Where everything is left."""
        return self.children.folder

    @property
    def profile(self) -> Path:
        """This machine, measured."""
        return self.folder / "profile.json"

    def steps(self) -> Iterator[Step]:
        """Yield all steps, in order of worth."""
        yield Step(name="tests", case="tests", seconds=TESTS_S, do=self.run_tests)
        yield Step(name="profile", case="profile", seconds=PROFILE_S, do=self.measure)
        for name, case in self.cases.items():
            yield Step(name=name, case=name, seconds=case.ours_s, do=partial(self.run_ours, name))
            for system, settings, seconds in (
                ("flexgen", case.flexgen, case.flexgen_s),
                ("accelerate", case.accelerate_batches, case.accelerate_s),
            ):
                if settings:
                    peer = Peer(
                        children=self.children,
                        system=system,
                        name=name,
                        case=case,
                        config=self.folder / "config.json",
                    )
                    yield Step(
                        name=f"{name}: {system}",
                        case=name,
                        seconds=seconds,
                        do=partial(self.run_peer, peer),
                    )

    def run_tests(self) -> dict[str, Any]:
        """Run all tests that a GPU is for; without one, those that Triton's interpreter runs."""
        tests = ROOT / "tests"
        files = [f for f in sorted(tests.glob("*/test_*.py")) if "mark.gpu" in f.read_text("utf-8")]
        workers = len(os.sched_getaffinity(0)) // CORES_PER_PROCESS
        words = ["-n", str(workers)] if workers > 1 and find_spec("xdist") else []
        marked = ["-q", "-rf", "-m", "gpu or gpu_kernels", *map(str, files)]
        out = self.children.run("tests", "-m", "pytest", *words, *marked, good=(0, 1))
        lines = out.read_text("utf-8", "replace").splitlines()
        counts = {what.rstrip("s"): int(number) for number, what in COUNTED.findall(lines[-1])}
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        say(f"tests: {lines[-1]}")
        return {"counts": counts} | ({"error": failed} if failed else {})

    def measure(self) -> dict[str, Any]:
        """Measure the machine, in full."""
        words = ["--offload-dir", str(self.folder), *(["--quick"] if self.rehearses else [])]
        self.children.run(
            "profile", "-m", "profiles.measure", "--output", str(self.profile), *words
        )
        return {"profile": read_json(self.profile, "profile")}

    def restore_profile(self, done: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the profile of an earlier call, where the folder has none."""
        if "profile" in done and not self.profile.exists():
            write_json(self.profile, done["profile"]["profile"])

    def run_ours(self, name: str) -> dict[str, Any]:
        """Search, and run one block."""
        case = self.cases[name]
        policy, machine = self._policy(case)
        path = self.folder / "policy.json"
        policy.save(path)
        predicted = estimate(policy, machine).throughput_tok_per_s
        say(f"{name}: predicted {predicted:.4g} token/s")
        out = self.children.run(
            "ours",
            "-m",
            "executor.bench",
            "--policy",
            str(path),
            "--dummy-weights",
            "--offload-dir",
            str(self.folder),
            "--runs",
            str(self.folder / "runs.csv"),
        )
        report: dict[str, Any] = json.loads(last_line(out))
        say(
            f"{name}: {report['measured_tok_per_s']:.4g} token/s,"
            f" attainment {report['attainment']:.2f}"
        )
        if report["num_blocks"] > 1 or report["block_size"] != report["num_prompts"]:
            raise RunError(f"{name}: not one full block, by which predictions are held to runs")
        return {
            "settings": to_json(replace(case, flexgen=())),
            "gpu": machine.gpu.name if machine.gpu else None,
            "cpu_experts": policy.cpu_experts,
            "ours": report,
        }

    def run_peer(self, peer: Peer) -> dict[str, Any]:
        """Let a peer do the work of a case."""
        write_json(peer.config, self._config(peer.case))
        offload = self.folder / OFFLOAD
        offload.mkdir(exist_ok=True)
        try:
            return peer.run()
        finally:
            shutil.rmtree(offload, ignore_errors=True)

    def _policy(self, case: GpuCase) -> tuple[Policy, HardwareProfile]:
        """Return the fastest policy of a case, and the machine that it is for."""
        if not self.profile.exists():
            raise RunError("no profile; try: the step profile")
        spec = spec_from_config(self._config(case), name=case.model).with_dtype(case.dtype)
        work = Workload(
            prompt_len=case.prompt_len, gen_len=case.gen_len, num_prompts=case.num_prompts
        )
        permitted = Permitted(weight_bits=(case.weight_bits,), cache_bits=(case.cache_bits,))
        machine = self._machine(case)
        search = ExpertsSearch(machine, spec, work)
        search.experts = case.experts
        policy = search.run(permitted).policy
        if case.experts == "in place":
            policy = replace(policy, cpu_experts=1.0, predicted=None)
        return policy, machine

    def _config(self, case: GpuCase) -> dict[str, Any]:
        return {**preset_config(case.model), **case.changes}

    def _machine(self, case: GpuCase) -> HardwareProfile:
        measured = HardwareProfile.load(self.profile)
        if not self.rehearses:
            return measured.with_budget(gpu_memory=case.gpu_memory, cpu_memory=case.cpu_memory)
        emulated = EmulatedGpu(memory_bytes=case.gpu_memory, link_bytes_per_s=LINK_BYTES_PER_S)
        return emulated.beside(measured.with_budget(cpu_memory=case.gpu_memory + case.cpu_memory))


class ExpertsSearch(Search):
    """A search that may be told where decode multiplies experts: see ``GpuCase.experts``."""

    experts = ""

    def _new_problems(self, machine: HardwareProfile, permitted: Permitted) -> Iterator[Problem]:
        for problem in super()._new_problems(machine, permitted):
            if not self.experts or problem.cpu_experts == (self.experts == "in place"):
                yield problem
