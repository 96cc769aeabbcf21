"""On a GPU whose memory is capped, models that are larger: ours beside FlexGen and accelerate.

Parts, each to be done in minutes: ``profile`` measures the machine, ``tests`` runs those marked
``gpu``, and every case searches, runs, and lets the peers run under the same caps with dummy
weights. Each case is one JSON line on stdout, and is appended to ``--result``; a last line says how
well each is predicted by a profile fitted to the others. Without a GPU, ``--rehearse`` takes the
same way with small models on an emulated one, and without peers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gpu_cases import CASES, REHEARSALS, FlexGenPolicy, GpuCase
from memory_cgroup import last_line
from workload_run import ROOT, BenchParser, circumstances, say

from costmodel.calibration.factors import calibrate, leave_one_out
from costmodel.calibration.measured_runs import MeasuredRun, row_of
from costmodel.model.loading import load_model_spec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.workload import Workload
from profiles.command import run
from profiles.emulate import EmulatedGpu
from profiles.errors import InputError, RunError
from profiles.files import read_json, to_json
from profiles.hardware import HardwareProfile

DTYPE = "float16"
# Of an emulated GPU, in a rehearsal.
LINK_BYTES_PER_S = 4e9
PARTS = ("profile", "tests")


def main(arguments: list[str]) -> None:
    """Do the parts that are asked for."""
    flags = _parser().parse_args(arguments)
    cases = REHEARSALS if flags.rehearse else CASES
    if not flags.rehearse and not torch.cuda.is_available():
        raise InputError("GPU", got="none", allowed="CUDA", hint="--rehearse")
    parts = flags.part or [*PARTS, *cases]
    if unknown := [part for part in parts if part not in (*PARTS, *cases)]:
        raise InputError("--part", got=unknown[0], allowed=", ".join((*PARTS, *cases)))
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    bench = GpuBench(folder=flags.work_dir, flags=flags)
    if "profile" in parts:
        bench.measure()
    if "tests" in parts and not flags.rehearse:
        bench.run_tests()
    for name in (part for part in parts if part in cases):
        bench.emit(bench.run_case(name, cases[name]) | circumstances("gpu.py", arguments))
    if len(bench.runs) > 1:
        bench.emit(bench.calibrated() | circumstances("gpu.py", arguments))


def _parser() -> BenchParser:
    parser = BenchParser(
        "gpu.py",
        description=(__doc__ or "").strip(),
        example="--work-dir gpu --part profile --part opt-6.7b",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, metavar="DIR", help="keeps the profile")
    add("--part", action="append", metavar="PART", help="may be repeated; default: all")
    add("--prompt-len", type=int, default=512, help="(512)")
    add("--gen-len", type=int, default=32, help="(32)")
    add("--num-prompts", type=int, help="in all; default: what a block wants")
    add("--timeout", type=int, default=240, help="seconds for one run (240)")
    add("--no-peers", action="store_true", help="ours alone")
    add("--trace", action="store_true", help="keep a timeline of each case in the work folder")
    add("--rehearse", action="store_true", help="small models on an emulated GPU")
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBench:
    """The parts of the benchmark, and the folder in which they leave what the next one needs."""

    folder: Path
    flags: argparse.Namespace
    # What ended so far, by the case's name.
    runs: dict[str, MeasuredRun] = field(default_factory=dict)

    def emit(self, result: Mapping[str, Any]) -> None:
        """Print a result as one line, and keep it where ``--result`` says."""
        line = json.dumps(result)
        print(line, flush=True)
        if self.flags.result is not None:
            with self.flags.result.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")

    @property
    def profile(self) -> Path:
        """This machine, measured."""
        return self.folder / "profile.json"

    def measure(self) -> None:
        """Measure the machine."""
        start = time.perf_counter()
        words = ["--quick"] if self.flags.rehearse else []
        self._run(
            "profile",
            "-m",
            "profiles.measure",
            "--output",
            str(self.profile),
            "--offload-dir",
            str(self.folder),
            *words,
        )
        say(f"measured in {time.perf_counter() - start:.0f} s")

    def run_tests(self) -> None:
        """Run the tests marked gpu; those that fail end the command."""
        self._run("tests", "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests/executor"))
        say(last_line(self.folder / "tests.out"))

    def run_case(self, name: str, case: GpuCase) -> dict[str, Any]:
        """Search, run one block, and let the peers run."""
        spec = load_model_spec(case.model).with_dtype(DTYPE)
        work = Workload(
            prompt_len=self.flags.prompt_len,
            gen_len=self.flags.gen_len,
            num_prompts=self.flags.num_prompts or case.num_prompts,
        )
        machine = self._machine(case)
        permitted = Permitted(weight_bits=(case.weight_bits,), cache_bits=(case.cache_bits,))
        found = search(machine, spec, work, permitted=permitted)
        policy = self.folder / "policy.json"
        found.policy.save(policy)
        say(f"{name}: predicted {found.job_tok_per_s:.4g} token/s")
        report = self._run_ours(name, policy)
        say(
            f"{name}: {report['measured_tok_per_s']:.4g} token/s,"
            f" attainment {report['attainment']:.2f}"
        )
        if report["num_blocks"] > 1 or report["block_size"] != report["num_prompts"]:
            raise RunError(f"{name}: not one full block, by which predictions are held to runs")
        self.runs[name] = MeasuredRun(
            policy=found.policy,
            throughput_tok_per_s=report["measured_tok_per_s"],
            prefill_s=report["prefill_s"],
            decode_s=report["decode_s"],
            emulated=self._emulated(case),
        )
        peers = [] if self.flags.no_peers or self.flags.rehearse else [*self._peers(name, case)]
        best = {
            system: max((p["tok_per_s"] for p in peers if p["system"] == system), default=None)
            for system in ("flexgen", "accelerate")
        }
        return {
            "benchmark": "a model larger than the GPU memory",
            "case": name,
            **to_json(replace(case, flexgen=())),
            "gpu": machine.gpu.name if machine.gpu else None,
            "run": row_of(self.runs[name]),
            "ours": report,
            "peers": peers,
            "speedup": {k: report["measured_tok_per_s"] / v for k, v in best.items() if v},
        }

    def calibrated(self) -> dict[str, Any]:
        """Return the errors of all cases as measured, fitted, and fitted to the others alone."""
        machine, runs = HardwareProfile.load(self.profile), [*self.runs.values()]
        fit = calibrate(machine, runs, source="gpu.py")
        return {
            "benchmark": "predictions of the GPU's cases",
            "cases": [*self.runs],
            "factors": dict(fit.factors),
            "errors_before": fit.errors_before,
            "errors_fitted": fit.errors_after,
            "errors_left_out": leave_one_out(machine, runs, source="gpu.py"),
        }

    def _machine(self, case: GpuCase) -> HardwareProfile:
        measured = HardwareProfile.load(self.profile)
        if emulated := self._emulated(case):
            total = case.gpu_memory + case.cpu_memory
            return emulated.beside(measured.with_budget(cpu_memory=total))
        return measured.with_budget(gpu_memory=case.gpu_memory, cpu_memory=case.cpu_memory)

    def _emulated(self, case: GpuCase) -> EmulatedGpu | None:
        if not self.flags.rehearse:
            return None
        return EmulatedGpu(memory_bytes=case.gpu_memory, link_bytes_per_s=LINK_BYTES_PER_S)

    def _run_ours(self, name: str, policy: Path) -> dict[str, Any]:
        words = [
            "-m",
            "executor.bench",
            "--policy",
            str(policy),
            "--dummy-weights",
            "--offload-dir",
            str(self.folder),
        ]
        if self.flags.num_prompts:
            words += ["--num-prompts", str(self.flags.num_prompts)]
        if self.flags.trace:
            words += ["--trace", str(self.folder / f"{name.replace(' ', '-')}-trace.json")]
        self._run("ours", *words)
        report: dict[str, Any] = json.loads(last_line(self.folder / "ours.out"))
        return report

    def _peers(self, name: str, case: GpuCase) -> Iterator[dict[str, Any]]:
        settings: list[FlexGenPolicy | int] = [*case.flexgen, *case.accelerate_batches]
        for setting in settings:
            system = "flexgen" if isinstance(setting, FlexGenPolicy) else "accelerate"
            try:
                figures = self._run_peer(system, case, setting)
            except RunError as error:
                say(f"{name}: {system}: {error}")
                figures = {"error": str(error), "tok_per_s": 0.0}
            else:
                say(f"{name}: {system} {figures['tok_per_s']:.4g} token/s")
            shown = to_json(setting) if isinstance(setting, FlexGenPolicy) else {"batch": setting}
            yield {"system": system, "setting": shown, **figures}

    def _run_peer(self, system: str, case: GpuCase, setting: FlexGenPolicy | int) -> dict[str, Any]:
        output = self.folder / f"{system}.json"
        output.unlink(missing_ok=True)
        script = str(Path(__file__).with_name("flexgen_run.py"))
        common = [
            "--gpu-memory",
            str(case.gpu_memory),
            "--output",
            str(output),
            "--prompt-len",
            str(self.flags.prompt_len),
            "--gen-len",
            str(self.flags.gen_len),
        ]
        if isinstance(setting, FlexGenPolicy):
            sequences = setting.gpu_batch_size * setting.num_gpu_batches
            words = [*common, *_flexgen_words(case, setting), "--offload-dir", str(self.folder)]
        else:
            sequences = setting
            script = str(Path(__file__).with_name("accelerate_gpu_run.py"))
            words = [*common, "--model", case.model, "--batch", str(setting)]
        self._run(system, script, *words)
        figures = read_json(output, system)
        seconds = figures["prefill_s"] + figures["decode_s"]
        return figures | {"tok_per_s": sequences * self.flags.gen_len / seconds}

    def _run(self, name: str, *words: str) -> None:
        """Run a child with its output in the folder."""
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        try:
            with out.open("wb") as stdout, err.open("wb") as stderr:
                status = subprocess.run(
                    [sys.executable, *words],
                    cwd=ROOT,
                    env=environment,
                    stdout=stdout,
                    stderr=stderr,
                    check=False,
                    timeout=self.flags.timeout,
                ).returncode
        except subprocess.TimeoutExpired:
            raise RunError(f"{name} took more than {self.flags.timeout} s") from None
        if status:
            raise RunError(f"{name} ended with status {status}: {last_line(err)}")


def _flexgen_words(case: GpuCase, policy: FlexGenPolicy) -> list[str]:
    switches = {
        "--cpu-cache-compute": policy.cpu_cache_compute,
        "--compress-weight": policy.compresses_weights,
        "--compress-cache": policy.compresses_cache,
    }
    return [
        "--model",
        f"facebook/{case.model}",
        "--path",
        "_DUMMY_",
        "--percent",
        *map(str, policy.percent),
        "--gpu-batch-size",
        str(policy.gpu_batch_size),
        "--num-gpu-batches",
        str(policy.num_gpu_batches),
        *(name for name, is_on in switches.items() if is_on),
    ]


if __name__ == "__main__":
    run(main)
