"""The command ``python -m costmodel.search``: solve for the best policy and write it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from costmodel.model_spec import ModelSpec, load_model_spec
from costmodel.optimum import SearchResult, search
from costmodel.report import format_explanation, format_prediction
from costmodel.workload import Workload
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.files import to_json
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile

# FlexGen's main workload (ICML 2023, table 2).
DEFAULT_MODEL = "opt-30b"
DEFAULT_PROMPT_LEN = 512
DEFAULT_GEN_LEN = 32


def _parser() -> Parser:
    parser = Parser(
        prog="costmodel.search",
        description="Find where every byte should live and how large the block should be.",
        example="python -m costmodel.search --hardware profile.json --model llama-3.1-8b"
        " --num-prompts 256 --cpu-memory 16GiB",
    )
    add = parser.add_argument
    add("--hardware", required=True, help="profile.json, or the name of a recorded machine")
    add("--model", default=DEFAULT_MODEL, help=f"preset, folder or config ({DEFAULT_MODEL})")
    add("--prompt-len", type=int, default=DEFAULT_PROMPT_LEN, help=f"({DEFAULT_PROMPT_LEN})")
    add("--gen-len", type=int, default=DEFAULT_GEN_LEN, help=f"({DEFAULT_GEN_LEN})")
    add("--num-prompts", type=int, help="sequences in all; default: as many as a block wants")
    add("--dtype", help="float32, float16 or bfloat16; default: the model's own")
    parser.add_bytes("--gpu-memory", help="budget, in place of what was measured")
    parser.add_bytes("--cpu-memory", help="budget, in place of what was measured")
    parser.add_bytes("--disk", help="budget, in place of what was measured")
    parser.add_seconds("--max-latency", help="limit on the latency of one block")
    add("--output", type=Path, default=Path("policy.json"), help="default: policy.json")
    add("--explain", action="store_true", help="bound, memory by buffer, shadow prices")
    add("--json", action="store_true", help="end with the policy in one line")
    return parser


def choose_dtype(model: ModelSpec, hardware: HardwareProfile, dtype: str | None) -> ModelSpec:
    """Return the model in the dtype asked for, else in the best one that the machine computes.

    A float16 model computes in bfloat16 on a CPU, where float16 products are many times slower.
    """
    if dtype is not None:
        return model.with_dtype(dtype)
    computes_on_cpu = hardware.gpu is None or hardware.gpu.emulated
    if model.dtype == "float16" and computes_on_cpu:
        print(
            f"note: {model.name} computes in bfloat16 here, because float16 products are many"
            " times slower on a CPU; --dtype float16 insists",
            file=sys.stderr,
        )
        return model.with_dtype("bfloat16")
    return model


def main(arguments: list[str]) -> None:
    """Search, print, write."""
    flags = _parser().parse_args(arguments)
    hardware = find_profile(flags.hardware).with_budget(
        gpu_memory=flags.gpu_memory, cpu_memory=flags.cpu_memory, disk=flags.disk
    )
    if not flags.output.parent.is_dir():
        raise InputError(
            f"--output {flags.output}", got="no such folder", allowed="a file in a folder"
        )
    if flags.output.is_dir():
        raise InputError(f"--output {flags.output}", got="a folder", allowed="a file in a folder")
    model = choose_dtype(load_model_spec(flags.model), hardware, flags.dtype)
    workload = Workload(
        prompt_len=flags.prompt_len, gen_len=flags.gen_len, num_prompts=flags.num_prompts
    )
    result = search(hardware, model, workload, max_latency_s=flags.max_latency)
    result.policy.save(flags.output)
    _show(result, hardware, explain=flags.explain)
    print(f"\npolicy written to {flags.output}")
    if flags.json:
        print(json.dumps(to_json(result.policy)))


def _show(result: SearchResult, hardware: HardwareProfile, *, explain: bool) -> None:
    print(format_prediction(result.policy, hardware, result.predicted))
    if explain:
        print()
        print(format_explanation(result, hardware))


if __name__ == "__main__":
    run(main)
