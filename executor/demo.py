"""The command ``python -m executor.demo``: the three commands on the bundled model.

The memory it is given holds a Python process and a little more, so that part of the weights and
of the KV cache must be stored on disk, as they would be with a large model on a small machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from costmodel.pricing.workspace import LIBRARY_BYTES
from executor.data import MODEL, PROMPTS
from profiles.command import Parser, run
from profiles.errors import RunError
from profiles.hardware import HardwareProfile
from profiles.start import called
from profiles.units import MIB

# Beside what a process holds anyway: so little that the cache is never kept in memory whole. With
# 10 MiB and more, the measured rates decide.
MEMORY_BYTES = LIBRARY_BYTES + 8 * MIB
PROMPT_LEN = 20
GEN_LEN = 48
NUM_SHOWN = 8


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.demo",
        description="Measure this machine, search, and run the bundled model in too little memory.",
        example="python -m executor.demo --folder demo",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("demo"),
        help="folder for profile, policy and outputs (default: demo)",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Measure, search, generate; show what was written."""
    folder = parser().parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    profile, policy = folder / "profile.json", folder / "policy.json"
    outputs = folder / "outputs.jsonl"

    _say("1  measure: the rates of this machine")
    _command("profiles.measure", "--quick", "--output", profile, "--offload-dir", folder)

    memory = HardwareProfile.load(profile).cpu.runtime_bytes + MEMORY_BYTES
    _say("2  search: the best placement, in a little less memory than the model needs")
    _command(
        "costmodel.search",
        "--hardware",
        profile,
        "--model",
        MODEL,
        "--output",
        policy,
        "--prompt-len",
        PROMPT_LEN,
        "--gen-len",
        GEN_LEN,
        "--num-prompts",
        _count(PROMPTS),
        "--cpu-memory",
        f"{memory}B",
        "--margin",
        0,
    )

    _say("3  generate: run the policy, and compare it with the prediction")
    _command(
        "executor.generate",
        "--policy",
        policy,
        "--model",
        MODEL,
        "--prompts",
        PROMPTS,
        "--output",
        outputs,
        "--offload-dir",
        folder,
        "--temperature",
        0.7,
        "--top-k",
        40,
    )
    _show(outputs)


def _count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _say(heading: str) -> None:
    print(f"\n=== {heading}\n", flush=True)


def _command(module: str, *arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ {' '.join([called(module), *words])}\n", flush=True)
    # The CPU alone, so that the demo shows the same anywhere: this model fits any GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, "-m", module, *words], env=environment, check=False)
    if ended.returncode:
        raise RunError(f"{module} ended with status {ended.returncode}")


def _show(outputs: Path) -> None:
    _say(f"the first {NUM_SHOWN} continuations")
    for line in outputs.read_text(encoding="utf-8").splitlines()[:NUM_SHOWN]:
        record = json.loads(line)
        text = f"[{record['prompt']}]{record['text']}".replace("\n", " ")
        print(textwrap.fill(text, width=96, subsequent_indent="    ") + "\n")


if __name__ == "__main__":
    run(main)
