"""The command ``python -m executor.lm_eval``: tasks of lm-evaluation-harness, in blocks.

The harness's own command knows the model once ``executor.harness.model`` is imported. Its name is
``zigzag``, and its arguments are the flags here::

    python -c "import executor.harness.model, lm_eval.__main__ as m; m.cli_evaluate()" run
        --model zigzag --model_args pretrained=DIR,cpu_memory=8GiB --tasks hellaswag
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from costmodel.cli.flags import check_outputs
from executor.cli.job_flags import add_offload_flags
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.output_checks import output_path
from profiles.outputs import write_output

PACKAGES = ("lm_eval", "transformers")
# What the harness's model takes of the flags, by the same names.
OPTIONS = (
    "max_length",
    "max_gen_toks",
    "policy",
    "hardware",
    "offload_dir",
    "dtype",
    "weight_bits",
    "cache_bits",
    "group_size",
    "sparsity",
    "requantize",
    "gpu_memory",
    "cpu_memory",
    "disk",
)


def main(arguments: list[str]) -> None:
    """Check, run the tasks, print their table."""
    flags = parser().parse_args(arguments)
    _check(flags)
    with check_outputs(flags, "output"):
        _run(flags)


def _check(flags: argparse.Namespace) -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            "executor.lm_eval",
            got=f"{', '.join(missing)} not installed",
            allowed="lm-evaluation-harness and transformers",
            hint="pip install 'zigzag-llm[eval]'",
        )
    if flags.limit is not None and not flags.limit > 0:
        raise InputError("--limit", got=flags.limit, allowed="above 0")
    if flags.gen_kwargs and not all("=" in part for part in flags.gen_kwargs.split(",")):
        allowed = "settings such as temperature=0.5,max_gen_toks=64"
        raise InputError("--gen-kwargs", got=flags.gen_kwargs, allowed=allowed)


def parser() -> Parser:
    """Return the parser of the command's flags."""
    made = Parser(
        prog="executor.lm_eval",
        description="Run tasks of lm-evaluation-harness on a model that may exceed the memory.",
        example="python -m executor.lm_eval --model DIR --tasks hellaswag,gsm8k --cpu-memory 8GiB",
    )
    add = made.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    add("--tasks", required=True, help="names of tasks or YAML files, separated by commas")
    add("--include-path", type=Path, metavar="DIR", help="folder with additional tasks")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples before each question (default: that of the task)",
    )
    add(
        "--limit",
        type=float,
        metavar="N",
        help="evaluate only so many documents of each task; below 1: that share of them",
    )
    add("--apply-chat-template", action="store_true", help="wrap each request in the chat template")
    add("--system-instruction", metavar="TEXT", help="system message for the chat template")
    add(
        "--gen-kwargs", metavar="A=B,...", help="generation settings in place of those of the tasks"
    )
    add(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="longest sequence (default: the context length of the model)",
    )
    add(
        "--max-gen-toks",
        type=int,
        metavar="TOKENS",
        help="tokens to generate where a task sets no number (default: 256)",
    )
    add("--output", type=output_path, metavar="FILE", help="write results and samples as JSON")
    add("--json", action="store_true", help="print the results as one line of JSON at the end")
    add_offload_flags(made)
    return made


def _run(flags: argparse.Namespace) -> None:
    # The harness takes seconds to import.
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    from executor.harness.model import ZigzagLM
    from executor.harness.tasks import ToldTasks, check_tasks

    include = None if flags.include_path is None else str(flags.include_path)
    manager = ToldTasks(include_path=include)
    tasks = flags.tasks.split(",")
    check_tasks(tasks, manager)
    given = {name: getattr(flags, name) for name in OPTIONS}
    model = ZigzagLM(flags.model, **{k: v for k, v in given.items() if v is not None})
    found: dict[str, Any] = simple_evaluate(
        model,
        tasks=tasks,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        apply_chat_template=flags.apply_chat_template,
        system_instruction=flags.system_instruction,
        gen_kwargs=flags.gen_kwargs,
        task_manager=manager,
    )
    print(make_table(found))
    if flags.output is not None:
        dump = partial(json.dump, found, default=handle_non_serializable)

        def write(handle: TextIO) -> None:
            dump(handle)

        write_output(flags.output, write)
    if flags.json:
        print(json.dumps(found["results"], default=handle_non_serializable))


if __name__ == "__main__":
    run(main)
