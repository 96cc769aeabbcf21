"""What all sides of the benchmark share: the model, the prompts, and how a child is run."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from memory_cgroup import Ended, MemoryCgroup, last_line

from costmodel.families import preset_config, spec_from_config
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from executor.checkpoint.dummy import write_random_checkpoint
from profiles.command import Parser
from profiles.errors import InputError, RunError
from profiles.files import read_json, write_json
from profiles.hardware import HardwareProfile

ROOT = Path(__file__).resolve().parents[2]
# Part of the limit that is left to page cache and kernel: both count, and neither is ours to plan.
RESERVE = 0.03
TIMEOUT_S = 3600.0
# The first token is prefill's, so that decode needs a second one to be timed.
LEAST = {"num_prompts": 1, "prompt_len": 1, "gen_len": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One workload and where its files are; ``config`` is the model's ``config.json``."""

    config: Mapping[str, Any]
    model: ModelSpec
    num_prompts: int
    prompt_len: int
    gen_len: int
    limit_bytes: int
    seed: int
    folder: Path
    router_skew: float = 0.0

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(flag, got=getattr(self, name), allowed=f"{least} or more")

    @property
    def checkpoint(self) -> Path:
        """Folder of the model that all read."""
        skew = f"-skew-{self.router_skew:g}" if self.router_skew else ""
        return self.folder / f"{self.model.name}-seed-{self.seed}{skew}"

    @property
    def prompts(self) -> Path:
        """File of the prompts, as lines with ``prompt_ids``."""
        return self.folder / "prompts.jsonl"

    @property
    def budget_bytes(self) -> int:
        """What the policy may plan with."""
        return int(self.limit_bytes * (1 - RESERVE))

    @property
    def num_tokens(self) -> int:
        """Tokens that a run generates."""
        return self.num_prompts * self.gen_len

    @property
    def weight_bytes(self) -> int:
        """Size of the checkpoint's weights."""
        return sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors"))

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all prompts, full length."""
        elements = sum(2 * n * kind.attention.kv_size for kind, n in self.model.kinds_and_counts)
        token = elements * self.model.dtype_bytes
        return self.num_prompts * (self.prompt_len + self.gen_len) * token

    def make_inputs(self) -> None:
        """Write the model, unless it is there already, and the prompts."""
        self.make_model()
        draw = random.Random(self.seed)
        with self.prompts.open("w", encoding="utf-8") as handle:
            for _ in range(self.num_prompts):
                ids = [draw.randrange(self.model.vocab_size) for _ in range(self.prompt_len)]
                handle.write(json.dumps({"prompt_ids": ids}) + "\n")

    def make_model(self) -> None:
        """Write the model, unless it is there already."""
        made_from = {"config": self.config, "seed": self.seed, "router_skew": self.router_skew}
        stamp = self.checkpoint / "made_from.json"
        if not stamp.exists() or read_json(stamp, "stamp") != made_from:
            say(f"making random weights of {self.model.name}")
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            write_random_checkpoint(
                self.checkpoint, self.config, seed=self.seed, router_skew=self.router_skew
            )
            write_json(stamp, made_from)

    @contextlib.contextmanager
    def offload_folder(self, name: str) -> Iterator[Path]:
        """Make the folder that a system offloads to, empty; remove it with what it holds."""
        folder = self.folder / f"offload-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def open_bench(flags: argparse.Namespace) -> Iterator[Bench]:
    """Yield the workload of a command's flags, in its work folder or in one that goes with it."""
    with work_folder(flags) as folder:
        config = config_of(flags.preset, flags.num_layers)
        yield Bench(
            config=config,
            model=spec_from_config(config, name=load_model_spec(flags.preset).name),
            num_prompts=flags.num_prompts,
            prompt_len=flags.prompt_len,
            gen_len=flags.gen_len,
            limit_bytes=flags.memory,
            seed=flags.seed,
            folder=folder,
            router_skew=getattr(flags, "router_skew", 0.0),
        )


@contextlib.contextmanager
def work_folder(flags: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of ``--work-dir``, or one that goes with the command."""
    if flags.work_dir is None:
        with tempfile.TemporaryDirectory(prefix="zigzag-bench-") as name:
            yield Path(name)
    else:
        folder: Path = flags.work_dir.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def config_of(preset: str, num_layers: int | None) -> dict[str, Any]:
    """Return a preset's ``config.json``, or the one in a file or folder, cut to some layers.

    Rotary positions are not scaled: the file that llama.cpp reads says nothing of it, and no
    prompt here is long.
    """
    path = Path(preset)
    path = path / "config.json" if path.is_dir() else path
    raw = read_json(path, "model config") if path.is_file() else preset_config(preset)
    config = {key: value for key, value in raw.items() if key != "rope_scaling"}
    return config if num_layers is None else config | {"num_hidden_layers": num_layers}


@dataclass(frozen=True)
class Runs:
    """Runs the children of one bench: same threads, no GPU, output into files."""

    bench: Bench

    @property
    def num_threads(self) -> int:
        """Threads that every system computes with."""
        return len(os.sched_getaffinity(0))

    @cached_property
    def environment(self) -> dict[str, str]:
        """Environment of every child."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {
            "OMP_NUM_THREADS": str(self.num_threads),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
        }

    def log(self, name: str) -> Path:
        """File that takes what a child prints; its errors are beside it in ``.log.err``."""
        return self.bench.folder / f"{name}.log"

    def free(self, name: str, *words: str) -> None:
        """Run one of our commands outside the limit."""
        out, err = self.log(name), self.log(name).with_suffix(".log.err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            status = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=self.environment,
                stdout=stdout,
                stderr=stderr,
                check=False,
            ).returncode
        if status:
            raise RunError(f"{name} ended with status {status}: {last_line(err)}")

    def limited(
        self,
        name: str,
        *words: str,
        timeout_s: float,
        drive: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> Ended:
        """Run a command under the limit, with cold files; ``drive``: see ``MemoryCgroup.run``."""
        _drop_from_page_cache(self.bench.folder)
        with MemoryCgroup(self.bench.limit_bytes) as group:
            return group.run(
                words,
                env=self.environment,
                folder=ROOT,
                log=self.log(name),
                timeout_s=timeout_s,
                drive=drive,
            )

    def rates(self, ended: Ended, prefill_s: float, decode_s: float) -> dict[str, float | None]:
        """Count the same way for all: tokens over both phases; what loads is in ``process_s``."""
        return {
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "tok_per_s": self.bench.num_tokens / (prefill_s + decode_s),
            "process_s": ended.wall_s,
            "cgroup_peak_bytes": ended.peak_bytes,
        }


def _drop_from_page_cache(folder: Path) -> None:
    """Make the next read of every file a real one, charged to who reads it."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def say(line: str) -> None:
    """Tell what is being done, beside the result."""
    print(line, file=sys.stderr, flush=True)


def cpu_name() -> str:
    """Return the processor's name, or its architecture where it has none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())


class BenchParser(Parser):
    """The parser of a script in this folder, with the flag that keeps its result."""

    def __init__(self, script: str, *, description: str, example: str) -> None:
        super().__init__(
            prog="tests.bench",
            description=description,
            example=f"python tests/bench/{script} {example}",
        )
        self.prog = f"python tests/bench/{script}"
        self.add_argument("--result", type=Path, metavar="FILE", help="keep the JSON here too")

    def add_model(self, *, default: str) -> None:
        """Add the flags that ``open_bench`` reads of the model's shape."""
        shape = f"shape: a preset or a config.json ({default})"
        self.add_argument("--preset", default=default, help=shape)
        cut = "keep the first N layers of it; default: all"
        self.add_argument("--num-layers", type=int, metavar="N", help=cut)


def run_module(words: Sequence[str], log: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Run one of our commands without a GPU and return the last line on its stdout; its errors go
    to ``log``."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        with log.open("wb") as err:
            done = subprocess.run(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=err,
                check=False,
                timeout=timeout_s,
                text=True,
            )
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} took more than {timeout_s:.0f} s") from None
    if done.returncode:
        raise RunError(f"{words[0]} ended with status {done.returncode}: {last_line(log)}")
    return done.stdout.splitlines()[-1]


def profile_in(folder: Path, name: str = "profile") -> HardwareProfile:
    """Return the profile that is kept in a folder, measured now if there is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        say("measuring the machine")
        words = ["profiles.measure", "--offload-dir", str(folder), "--output", str(path)]
        run_module(words, folder / f"{name}.log")
    return HardwareProfile.load(path)


def keep_result(flags: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print a result as one line, and keep it where ``--result`` says."""
    if flags.result is not None:
        write_json(flags.result, result)
    print(json.dumps(result))


def circumstances(script: str, arguments: Sequence[str], *packages: str) -> dict[str, Any]:
    """Return what a result says of how it came about: machine, versions, date and command."""
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "command": command_line(script, arguments),
    }


def command_line(script: str, arguments: Sequence[str]) -> str:
    """Return the command as a result keeps it: of paths the names, where they lie says nothing."""
    return shlex.join(["python", f"tests/bench/{script}", *map(_without_folders, arguments)])


def _without_folders(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (Path(value).name if "/" in value else value)
