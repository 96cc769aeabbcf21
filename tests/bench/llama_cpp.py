"""The peer: llama.cpp's own benchmark of many sequences at once, over a file that is mapped.

Its source comes in the package ``llama-cpp-python``. The tool draws tokens at random where others
take the likeliest, and reads the whole model once before its clock starts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contest import Attempt
from memory_cgroup import last_line
from workload_run import Runs, say

from profiles.errors import RunError

SOURCE = "llama-cpp-python==0.3.36"
TOOL = "llama-batched-bench"
QUANTIZER = "llama-quantize"
MAX_SEQUENCES = 256
# The tool may end before its log's thread has written the figures, unless it is told to wait.
LAST_CALL = "llama_perf_context_print(ctx);"
FLUSH = "common_log_flush(common_log_main());"
# Tokens of one pass through the weights; whether sequences share one cache, or have one each,
# padded to 256 tokens; the parts of the prompts that run one after another, for less memory; and
# whether quantized weights are copied into another order, which takes their size in memory.
SETTINGS = (
    {"ubatch": 512, "unified_cache": False, "parts": 1, "repacks": True},
    {"ubatch": 2048, "unified_cache": False, "parts": 1, "repacks": True},
    {"ubatch": 512, "unified_cache": True, "parts": 1, "repacks": True},
    {"ubatch": 512, "unified_cache": False, "parts": 1, "repacks": False},
    {"ubatch": 512, "unified_cache": False, "parts": 2, "repacks": False},
    {"ubatch": 512, "unified_cache": False, "parts": 4, "repacks": False},
)


@dataclass(slots=True, kw_only=True)
class LlamaCpp:
    """The batched bench; ``tool`` is built from the package's source where none is given.

    ``quantization`` is a type of llama.cpp's own quantizer, such as ``Q4_K``.
    """

    runs: Runs
    tool: Path | None = None
    ubatch: int | None = None
    parts: int | None = None
    may_repack: bool = True
    quantization: str | None = None
    name: str = "llama.cpp"

    def why_not(self) -> str | None:
        """Say what llama.cpp itself refuses, before minutes of building."""
        bench = self.runs.bench
        if bench.model.family == "opt":
            return "llama.cpp has no OPT"
        if bench.num_prompts > MAX_SEQUENCES:
            return f"llama.cpp takes at most {MAX_SEQUENCES} sequences"
        return None

    @property
    def _plain_model(self) -> Path:
        # Beside the shards, so that it goes when they are made anew.
        return self.runs.bench.checkpoint / "model.gguf"

    @property
    def model(self) -> Path:
        """The file that is run."""
        if self.quantization is None:
            return self._plain_model
        return self._plain_model.with_name(f"model-{self.quantization}.gguf")

    def prepare(self) -> None:
        """Build the tool and write the model, unless they are there."""
        if find_spec("gguf") is None:
            raise RunError("the package gguf is missing; try: pip install '.[bench]'")
        if self.tool is None:
            self.tool = build_tool(self.runs.bench.folder, TOOL)
        if not self._plain_model.exists():
            from gguf_file import write_gguf  # needs the package that was just asked for

            say("writing the model as GGUF")
            write_gguf(self.runs.bench.checkpoint, self.runs.bench.model, self._plain_model)
        if self.quantization is not None and not self.model.exists():
            quantizer = build_tool(self.runs.bench.folder, QUANTIZER)
            say(f"quantizing the model to {self.quantization}")
            _step(
                self.runs.bench.folder,
                "quantize",
                str(quantizer),
                str(self._plain_model),
                str(self.model),
                self.quantization,
            )

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """List what may be fastest; the defaults come first."""
        ubatch, parts = self.ubatch, self.parts
        chosen = [setting for setting in SETTINGS if parts in (None, setting["parts"])]
        if ubatch is not None:
            chosen = [
                setting
                for setting in chosen
                if setting["ubatch"] == ubatch and not setting["unified_cache"]
            ]
        if not self.may_repack:
            chosen = [setting for setting in chosen if not setting["repacks"]]
        return [s for s in chosen if s["parts"] <= self.runs.bench.num_prompts]

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Prefill all prompts, then decode one token less: the first is prefill's."""
        bench, threads = self.runs.bench, str(self.runs.num_threads)
        length = bench.prompt_len + bench.gen_len
        groups = _groups(bench.num_prompts, setting["parts"])
        ended = self.runs.limited(
            self.name,
            str(self.tool),
            "-m",
            str(self.model),
            "-c",
            str(groups[0] * length),
            "-npl",
            ",".join(map(str, groups)),
            "-npp",
            str(bench.prompt_len),
            "-ntg",
            str(bench.gen_len - 1),
            "-ub",
            str(setting["ubatch"]),
            "-b",
            "2048",
            "-t",
            threads,
            "-tb",
            threads,
            *(["--kv-unified"] if setting["unified_cache"] else []),
            *([] if setting["repacks"] else ["--no-repack"]),
            "--output-format",
            "jsonl",
            timeout_s=timeout_s,
        )
        found = _figures(self.runs.log(self.name)) if ended.is_good else []
        if len(found) != len(groups):
            return Attempt(ended=ended)
        prefill, decode = (sum(part[name] for part in found) for name in ("t_pp", "t_tg"))
        return Attempt(ended=ended, figures=self.runs.rates(ended, prefill, decode))

    def version(self) -> str:
        """Ask the tool; it knows nothing of the package that its source came in."""
        return version_of(self.tool)


def version_of(tool: Path | None) -> str:
    """Return what a tool of llama.cpp says of itself."""
    asked = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=False)
    lines = (asked.stdout + asked.stderr).splitlines()
    said = next((line for line in lines if line.startswith("version")), "unknown version")
    return f"llama.cpp {said}"


def build_tool(folder: Path, name: str) -> Path:
    """Fetch the source and compile a tool for this processor into ``folder``; takes minutes."""
    tool, scratch = folder / name, folder / "llama.cpp"
    if tool.exists():
        return tool
    if shutil.which("cmake") is None:
        raise RunError("llama.cpp needs cmake and a C++ compiler; try: --llama-batched-bench PATH")
    say(f"building {name} from {SOURCE}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    _step(
        scratch,
        "fetch",
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        ".",
        SOURCE,
    )
    with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    source = next(scratch.glob("*/vendor/llama.cpp"))
    code = source / "tools/batched-bench/batched-bench.cpp"
    text = code.read_text(encoding="utf-8")
    assert text.count(LAST_CALL) == 1
    code.write_text(text.replace(LAST_CALL, f"{LAST_CALL} {FLUSH}"), encoding="utf-8")
    _step(
        scratch,
        "configure",
        "cmake",
        "-S",
        str(source),
        "-B",
        "build",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DLLAMA_OPENSSL=OFF",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
    )
    jobs = str(len(os.sched_getaffinity(0)))
    targets = (TOOL, QUANTIZER) if name in (TOOL, QUANTIZER) else (name,)
    _step(
        scratch,
        "build",
        "cmake",
        "--build",
        "build",
        "--target",
        *targets,
        "--parallel",
        jobs,
    )
    for built in targets:
        (scratch / "build" / "bin" / built).replace(folder / built)
    shutil.rmtree(scratch)
    return tool


def _step(folder: Path, name: str, *command: str) -> None:
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        status = subprocess.run(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        raise RunError(f"{name} of llama.cpp ended with status {status}: {last_line(log)}")


def _groups(num_prompts: int, parts: int) -> list[int]:
    """Return the prompts of each part, the largest first."""
    size = -(-num_prompts // parts)
    return [min(size, num_prompts - first) for first in range(0, num_prompts, size)]


def _figures(log: Path) -> list[dict[str, Any]]:
    """Return the seconds of both phases of each part; none where the context is too small."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [part for part in found if math.isfinite(part["t"])]
