"""How long a large job takes to start, and what it remembers of each prompt.

A file of short prompts is written in each form that a job may have: chat and plain requests of a
batch file, lines of text, lines of token ids. Reading it is timed from the first byte to the table
of requests, with loading the tokenizer; what it holds is measured in a second pass, because that
slows it. One JSON line goes to stdout.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
import tracemalloc
from functools import cache, partial
from pathlib import Path
from typing import Any

from workload_run import BenchParser, circumstances, keep_result, say

from executor.data import HELD_OUT, MODEL
from executor.jobs.input_file import InputFile
from executor.jobs.limits import RequestLimits
from executor.jobs.lines import PromptLines
from executor.jobs.openai import CHAT, PLAIN, BatchLines
from executor.jobs.params import ParamsMaker
from executor.jobs.reading import ReadJob, read_job
from executor.model.generation_config import GenerationConfig
from executor.model.sampling_params import SamplingParams
from executor.text.chat import ChatTemplate
from executor.text.loading import load_template, load_tokenizer
from profiles.command import run
from profiles.errors import InputError

FORMS = ("chat", "plain", "text", "ids")
# For checkpoints without a template.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONGEST_ANSWER = 800
# Larger than that of any tokenizer here.
VOCABULARY = 2**20


def main(arguments: list[str]) -> None:
    """Write, read, print."""
    parser = BenchParser(
        "job_start.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/job-start.json",
    )
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, metavar="PATH", help="whose tokenizer (the demo's)")
    add("--num-prompts", type=int, default=50_000, help="(50,000)")
    add("--words", type=int, default=16, help="of a prompt, on average (16)")
    add("--rounds", type=int, default=3, help="(3)")
    add("--form", choices=FORMS, action="append", help="may be repeated (all)")
    flags = parser.parse_args(arguments)
    words = HELD_OUT.read_text(encoding="utf-8").split()
    forms: dict[str, Any] = {}
    for form in flags.form or FORMS:
        draw = random.Random(0)
        with tempfile.TemporaryDirectory(prefix="zigzag-bench-") as folder:
            path = Path(folder) / "in.jsonl"
            with path.open("w", encoding="utf-8") as handle:
                for number in range(flags.num_prompts):
                    handle.write(_line(form, number, words, flags.words, draw) + "\n")
            say(f"reading {flags.num_prompts} prompts as {form}")
            forms[form] = _figures(path, flags.model, flags.rounds)
            say(json.dumps(forms[form]))
    result = {
        "benchmark": "start of a large job",
        "prompts": flags.num_prompts,
        "words": flags.words,
        "tokenizer": flags.model.name,
        "rounds": flags.rounds,
        "forms": forms,
        **circumstances("job_start.py", arguments, "tokenizers", "jinja2"),
    }
    keep_result(flags, result)


def _line(form: str, number: int, words: list[str], mean: int, draw: random.Random) -> str:
    """Return a prompt of one to twice as many words as asked for, in some form."""
    count, first = draw.randint(1, 2 * mean - 1), draw.randrange(len(words))
    text = " ".join(words[(first + i) % len(words)] for i in range(count))
    if form == "text":
        return json.dumps({"prompt": text})
    if form == "ids":
        return json.dumps({"prompt_ids": [draw.randrange(4096) for _ in range(count)]})
    body: dict[str, Any] = {"model": "m", "max_tokens": draw.randint(1, LONGEST_ANSWER)}
    if form == "chat":
        system = {"role": "system", "content": "Answer in one sentence."}
        body["messages"] = [system, {"role": "user", "content": text}]
    else:
        body["prompt"] = text
    url = CHAT if form == "chat" else PLAIN
    named = {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body}
    return json.dumps(named)


def _figures(path: Path, model: Path, rounds: int) -> dict[str, Any]:
    seconds, cpu_seconds = [], []
    for _ in range(rounds):
        start, cpu_start = time.perf_counter(), time.process_time()
        job = _read(path, model)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    num_prompts = job.table.num_rows
    num_tokens = sum(job.table.prompt_len(row) for row in range(num_prompts))
    del job
    tracemalloc.start()
    kept = _read(path, model)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept.table.num_rows == num_prompts
    return {
        "tokens": num_tokens,
        "read_s": statistics.median(seconds),
        "read_s_each": seconds,
        # Of all threads: where other programs run too, it says more.
        "cpu_s": statistics.median(cpu_seconds),
        "s_per_million_tokens": statistics.median(seconds) / num_tokens * 1e6,
        # Of the tokens, 4 bytes each are no bookkeeping.
        "held_bytes_per_prompt": held / num_prompts - 4 * num_tokens / num_prompts,
        "most_bytes_per_prompt": most / num_prompts - 4 * num_tokens / num_prompts,
    }


def _read(path: Path, model: Path) -> ReadJob:
    """Read a job as the command does."""
    limits = RequestLimits(vocab_size=VOCABULARY, max_positions=2**20)
    config = GenerationConfig(path=model, values={})
    maker = ParamsMaker(SamplingParams(), config, vocab_size=VOCABULARY, gen_len=32)
    tokenizer = cache(partial(load_tokenizer, model))
    template = cache(partial(_template, model))
    plain = PromptLines(limits, maker, tokenizer)
    batch = BatchLines(limits, maker, tokenizer, template, model="m", created=0)
    with InputFile(path, path.parent) as file:
        return read_job(file, [plain, batch], is_strict=True)


def _template(model: Path) -> ChatTemplate:
    try:
        return load_template(model)
    except InputError:
        return ChatTemplate(CHATML, "template")


if __name__ == "__main__":
    run(main)
