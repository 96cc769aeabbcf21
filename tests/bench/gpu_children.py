"""The processes of tests/bench/gpu.py: started in turn, ended at the end of its time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases import FlexGenPolicy, GpuCase
from memory_cgroup import last_line
from workload_run import ROOT, say

from profiles.errors import RunError
from profiles.files import read_json, to_json

# Of a peer's setting, the tokens that are generated to compare it with others.
TRIED_TOKENS = 6
# accelerate moves the same weights in every step, so that a run of few tells the time of all.
EXTRAPOLATED = ("accelerate",)
# A step may take so many times what is expected.
MOST_TIMES = 2.0
# The folder in which a peer leaves what is on disk.
OFFLOAD = "peer-offload"
SCRIPTS = {"flexgen": "flexgen_run.py", "accelerate": "accelerate_gpu_run.py"}


class OutOfTimeError(RunError):
    """The command's time ended before a step did."""


@dataclass(slots=True, kw_only=True)
class Children:
    """Runs children whose output goes to files in ``folder``.

    They end at ``deadline_s``, that of the command, or at ``step_end_s``, on the monotonic clock.
    """

    folder: Path
    deadline_s: float
    step_end_s: float = math.inf

    @property
    def left_s(self) -> float:
        """Seconds until the command's deadline."""
        return self.deadline_s - time.monotonic()

    def begin_step(self, expected_s: float) -> None:
        """Give a step some times the seconds that it is expected to take."""
        self.step_end_s = time.monotonic() + MOST_TIMES * expected_s

    def run(self, name: str, *words: str, good: tuple[int, ...] = (0,)) -> Path:
        """Run Python with these words; returns the file of what it printed.

        Raises
        ------
        OutOfTimeError
            When the command's deadline came first.
        RunError
            When the step's end came first, or its exit status is not ``good``.
        """
        end_s = min(self.deadline_s, self.step_end_s)
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
                    timeout=max(1.0, end_s - time.monotonic()),
                ).returncode
        except subprocess.TimeoutExpired:
            if self.step_end_s < self.deadline_s:
                raise RunError(f"{name} was ended with the time of its step") from None
            raise OutOfTimeError(f"{name} was ended with the time of the command") from None
        if status not in good:
            raise RunError(f"{name} ended with status {status}: {last_line(err)}")
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer on one case: each of its settings is tried with few tokens, the fastest one counts.

    ``config`` is the file of the model's ``config.json``.
    """

    children: Children
    system: str
    name: str
    case: GpuCase
    config: Path

    def run(self) -> dict[str, Any]:
        """Return all settings that were tried, and the throughput of the best one.

        Raises
        ------
        RunError
            When none reached its end.
        """
        settings: tuple[FlexGenPolicy | int, ...] = self.case.accelerate_batches
        if self.system == "flexgen":
            settings = self.case.flexgen
        tokens = min(TRIED_TOKENS, self.case.gen_len)
        tried = [self._attempt(setting, tokens) for setting in settings]
        best = max(range(len(tried)), key=lambda i: tried[i]["tok_per_s"])
        if not tried[best]["tok_per_s"]:
            raise RunError("; ".join(attempt["error"] for attempt in tried))
        if self.system not in EXTRAPOLATED and tokens < self.case.gen_len:
            tried.append(self._attempt(settings[best], self.case.gen_len))
            best = -1
        return {"system": self.system, "tried": tried, "tok_per_s": tried[best]["tok_per_s"]}

    def _attempt(self, setting: FlexGenPolicy | int, tokens: int) -> dict[str, Any]:
        shown = to_json(setting) if isinstance(setting, FlexGenPolicy) else {"batch": setting}
        try:
            figures = self._run(setting, tokens)
        except OutOfTimeError:
            raise
        except RunError as error:
            figures = {"error": str(error), "tok_per_s": 0.0}
        told = figures.get("error") or f"{figures['tok_per_s']:.4g} token/s"
        say(f"{self.name}: {self.system} {shown}: {told}")
        return {"setting": shown, "tokens": tokens, **figures}

    def _run(self, setting: FlexGenPolicy | int, tokens: int) -> dict[str, Any]:
        """Run a setting; its throughput is that of all tokens, in steps as long as these."""
        case, output = self.case, self.children.folder / f"{self.system}.json"
        output.unlink(missing_ok=True)
        words = ["--gpu-memory", str(case.gpu_memory), "--output", str(output)]
        words += ["--prompt-len", str(case.prompt_len), "--gen-len", str(tokens)]
        if isinstance(setting, FlexGenPolicy):
            sequences = setting.gpu_batch_size * setting.num_gpu_batches
            words += [*flexgen_words(case.model, setting)]
            words += ["--offload-dir", str(self.children.folder / OFFLOAD)]
        else:
            sequences = setting
            words += ["--config", str(self.config), "--dtype", case.dtype, "--batch", str(setting)]
        self.children.run(self.system, str(Path(__file__).with_name(SCRIPTS[self.system])), *words)
        figures = read_json(output, self.system)
        step_s = figures["decode_s"] / (tokens - 1)
        seconds = figures["prefill_s"] + step_s * (case.gen_len - 1)
        return figures | {"tok_per_s": sequences * case.gen_len / seconds}


def flexgen_words(model: str, policy: FlexGenPolicy) -> list[str]:
    """Return FlexGen's own flags for a policy."""
    switches = {
        "--cpu-cache-compute": policy.cpu_cache_compute,
        "--compress-weight": policy.compresses_weights,
        "--compress-cache": policy.compresses_cache,
    }
    return [
        "--model",
        f"facebook/{model}",
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
