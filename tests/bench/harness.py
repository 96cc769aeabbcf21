"""lm-evaluation-harness: our model beside its own ``hf``, and beside one request at a time.

Three tasks are made of local files: multiple choice, perplexity in rolling windows, and generation
up to a stop string. Every sample of both models is compared, with our weights on disk. Then the
multiple choice is run again with blocks of a single request.

Needs ``lm_eval``, ``accelerate`` and ``transformers``; no network.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from executor.checkpoint.folder import Checkpoint
from executor.data import HELD_OUT, MODEL
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile

TASKS = ("verse_ends", "chapters", "next_verse")
LOG_PROB_TOLERANCE = 1e-3
LEAST_SPEEDUP = 5.0
NUM_CHOICES = 4
ON_CPU, ON_DISK = Placement(cpu=1), Placement(disk=1)


def main() -> None:
    """Compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    flags = parser.parse_args()
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, flags.text.read_text(encoding="utf-8"), flags.questions)
        in_blocks = _save_policy(folder / "blocks.json", flags.model, (64, 4))
        alone = _save_policy(folder / "alone.json", flags.model, (1, 1))
        hf = _load("hf", flags.model, dtype="float32", device="cpu", batch_size="16")
        zigzag = partial(_load, "zigzag", flags.model, offload_dir=folder)
        theirs = _evaluate(hf, TASKS, folder)
        ours = _evaluate(zigzag(policy=in_blocks), TASKS, folder)
        for task in TASKS:
            print(_compare(task, theirs["samples"][task], ours["samples"][task]))
        seconds: dict[Path, list[float]] = {in_blocks: [], alone: []}
        for _ in range(flags.repeats):
            for policy, taken in seconds.items():
                taken.append(_seconds(zigzag(policy=policy), folder))
        speedup = min(seconds[alone]) / min(seconds[in_blocks])
        print(
            f"{flags.questions} questions of {NUM_CHOICES} choices: {min(seconds[in_blocks]):.2f} s"
            f" in blocks, {min(seconds[alone]):.2f} s one at a time: {speedup:.1f} times as fast"
        )
    assert speedup >= LEAST_SPEEDUP


def write_tasks(folder: Path, text: str, count: int) -> None:
    """Write three tasks and their documents; ``text`` has a verse a line."""
    rng = random.Random(0)
    verses = [line.split() for line in text.splitlines() if 14 <= len(line.split()) <= 40]
    rng.shuffle(verses)
    documents = []
    for i in range(count):
        ends = [" ".join(verse[len(verse) // 2 :]) for verse in verses[i : i + NUM_CHOICES]]
        answer, order = ends[0], rng.sample(ends, NUM_CHOICES)
        begin = " ".join(verses[i][: len(verses[i]) // 2])
        documents.append({"begin": begin, "ends": order, "answer": order.index(answer)})
    _write_lines(folder / "verse_ends.jsonl", documents)
    # Some fill many windows of the model's context, one is shorter than a window.
    lines = text.splitlines()
    chapters = ["\n".join(lines[i * 60 : i * 60 + size]) for i, size in enumerate((60, 45, 30, 2))]
    _write_lines(folder / "chapters.jsonl", [{"text": chapter} for chapter in chapters])
    starts = [{"begin": document["begin"], "answer": ""} for document in documents[: count // 4]]
    _write_lines(folder / "next_verse.jsonl", starts)
    _write_task(
        folder,
        "verse_ends",
        output_type="multiple_choice",
        doc_to_text="{{begin}}",
        doc_to_choice="{{ends}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    _write_task(
        folder,
        "chapters",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    _write_task(
        folder,
        "next_verse",
        output_type="generate_until",
        doc_to_text="{{begin}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", ";", ": and"], "max_gen_toks": 48},
        metric_list=[{"metric": "exact_match"}],
    )


def _write_lines(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _write_task(folder: Path, name: str, **fields: Any) -> None:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        **fields,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def _save_policy(path: Path, model: Path, batches: tuple[int, int]) -> Path:
    """Save a policy whose weights are on disk, with so large batches and so many of them."""
    spec = Checkpoint.open(model, dtype="float32").spec
    size, count = batches
    Policy(
        model=spec,
        workload=Workload(prompt_len=128, gen_len=1),
        gpu_batch_size=size,
        num_gpu_batches=count,
        prefill_batch_size=min(size, 16),
        weights=placed_alike(spec, ON_DISK),
        cache=ON_CPU,
        activations=ON_CPU,
        weight_bits=spec.full_bits,
        cache_bits=spec.full_bits,
        hardware=_hardware(),
    ).save(path)
    return path


def _hardware() -> HardwareProfile:
    return replace(find_profile("cpu-2core"), contention=())


def _load(kind: str, model: Path, **options: Any) -> Any:
    """Return a model as the harness's own command makes it."""
    from lm_eval.api.registry import get_model

    import executor.harness.model  # noqa: F401

    arguments = {"pretrained": str(model)} | {name: str(v) for name, v in options.items()}
    return get_model(kind).create_from_arg_obj(arguments)


def _evaluate(model: Any, tasks: Sequence[str], folder: Path) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )


def _compare(task: str, theirs: Sequence[Any], ours: Sequence[Any]) -> str:
    """Compare all samples of a task; returns what was found."""
    assert len(theirs) == len(ours) > 0
    worst, count = 0.0, 0
    for expected, found in zip(theirs, ours, strict=True):
        assert expected["doc"] == found["doc"]
        pairs = zip(_answers(expected), _answers(found), strict=True)
        for one, other in pairs:
            count += 1
            if isinstance(one, str):
                assert one == other, (one, other)
                continue
            assert one[1:] == other[1:], (one, other)
            worst = max(worst, abs(one[0] - other[0]))
    assert worst <= LOG_PROB_TOLERANCE, worst
    return f"{task}: {count} answers as those of hf; log-likelihoods differ by {worst:.1e} at most"


def _answers(sample: Any) -> list[Any]:
    """Return texts, or log-likelihoods with what comes with them."""
    answers: list[Any] = []
    for answer in sample["resps"]:
        first = answer[0]
        answers.append(first if isinstance(first, str | list | tuple) else [first])
    return answers


def _seconds(model: Any, folder: Path) -> float:
    """Return the seconds of scoring all choices, with planning and loading the weights."""
    taken: list[float] = []
    score = model.loglikelihood

    def timed(*arguments: Any, **options: Any) -> Any:
        start_s = time.perf_counter()
        answers = score(*arguments, **options)
        taken.append(time.perf_counter() - start_s)
        return answers

    model.loglikelihood = timed
    _evaluate(model, ["verse_ends"], folder)
    return taken[0]


if __name__ == "__main__":
    main()
