"""Flags of every command that searches: machine, model, workload, permitted approximations."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from costmodel.cli.work_flags import (
    DEFAULT_GEN_LEN as DEFAULT_GEN_LEN,
)
from costmodel.cli.work_flags import (
    DEFAULT_PROMPT_LEN as DEFAULT_PROMPT_LEN,
)
from costmodel.cli.work_flags import (
    add_work_flags,
    read_workload,
)
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import FULL_BITS, Permitted
from costmodel.optimizer.optimum import DEFAULT_MARGIN
from costmodel.plan.workload import Workload
from profiles.command import Parser
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.output_checks import checked_outputs
from profiles.packing import DEFAULT_GROUP_SIZE, GROUP_SIZES
from profiles.recorded import find_profile

# FlexGen's main workload (ICML 2023, table 2).
DEFAULT_MODEL = "opt-30b"
PICTURES = (".png", ".svg", ".pdf")
# Flags that name input files.
INPUTS = ("hardware", "model", "policy", "prompts", "text", "runs", "lengths", "cluster")
CHECKPOINT_FILES = (
    "*config.json",
    "*.index.json",
    "*.safetensors",
    "tokenizer*",
    "*tokens*.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.bin",
    "*.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The input of a search."""

    hardware: HardwareProfile
    model: ModelSpec
    workload: Workload
    margin: float
    permitted: Permitted


def add_question_flags(parser: Parser) -> None:
    """Add the flags that ``read_question`` reads."""
    add = parser.add_argument
    add("--hardware", required=True, help="profile file, or the name of a recorded machine")
    add(
        "--model",
        default=DEFAULT_MODEL,
        help=f"preset, checkpoint folder or config.json (default: {DEFAULT_MODEL})",
    )
    add_search_flags(parser)


def add_search_flags(parser: Parser) -> None:
    """Add the flags of a search beside machine and model."""
    add = parser.add_argument
    add_work_flags(parser)
    add("--dtype", help="float32, float16 or bfloat16 (default: that of the model)")
    parser.add_bytes("--gpu-memory", help="GPU memory to use (default: that of the profile)")
    parser.add_bytes("--cpu-memory", help="CPU memory to use (default: that of the profile)")
    parser.add_bytes("--disk", help="disk space to use (default: that of the profile)")
    add(
        "--margin",
        type=float,
        default=DEFAULT_MARGIN,
        metavar="SHARE",
        help=f"share of every budget that stays free (default: {DEFAULT_MARGIN})",
    )
    add_permitted_flags(parser)


def add_permitted_flags(parser: Parser) -> None:
    """Add the flags that ``read_permitted`` reads: approximations that change a model's outputs."""
    add = parser.add_argument
    bits = "16 (uncompressed), 8, 4, or several such as 16,4 for the search to choose from"
    add("--weight-bits", metavar="BITS", help=f"bits of each weight: {bits} (default: 16)")
    add("--cache-bits", metavar="BITS", help=f"bits of each cache element: {bits} (default: 16)")
    sizes = ", ".join(str(size) for size in GROUP_SIZES)
    shared = f"compressed elements that share a scale: {sizes} (default: {DEFAULT_GROUP_SIZE})"
    add("--group-size", type=int, metavar="N", help=shared)
    add(
        "--requantize",
        action="store_true",
        default=None,
        help="let --weight-bits quantize a checkpoint again that is quantized",
    )
    sparse = "share of keys that each query attends to, those with the highest scores (default: 1)"
    add("--sparsity", type=float, metavar="SHARE", help=sparse)


def read_permitted(flags: argparse.Namespace) -> Permitted:
    """Return what the flags permit. Without a flag, only exact outputs are permitted."""
    return choose_permitted(
        weight_bits=_numbers("--weight-bits", flags.weight_bits),
        cache_bits=_numbers("--cache-bits", flags.cache_bits),
        group_size=flags.group_size,
        sparsity=flags.sparsity,
        requantizes=bool(flags.requantize),
    )


def choose_permitted(
    *,
    weight_bits: tuple[int, ...] | None,
    cache_bits: tuple[int, ...] | None,
    group_size: int | None,
    sparsity: float | None,
    requantizes: bool = False,
) -> Permitted:
    """Return what is permitted; ``None`` permits only exact outputs."""
    given: dict[str, Any] = {
        "weight_bits": weight_bits,
        "cache_bits": cache_bits,
        "group_size": group_size,
        "sparsity": sparsity,
    }
    permitted = replace(
        Permitted(),
        **{name: value for name, value in given.items() if value is not None},
        requantizes=requantizes,
    )
    if requantizes and min(permitted.weight_bits) == FULL_BITS:
        raise InputError(
            "--requantize",
            got="weights in 16 bits",
            allowed="with fewer bits",
            hint="--weight-bits 16,4",
        )
    if group_size is not None and not permitted.packs:
        raise InputError(
            "--group-size",
            got="16 bits everywhere, which have no groups",
            allowed="8 or 4 bits",
            hint="--weight-bits 16,4",
        )
    return permitted


def _numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(flag, got=text, allowed="16, 8, 4, with commas between") from None


def read_question(flags: argparse.Namespace) -> Question:
    """Return the machine with its budgets, the model in its dtype, and the workload."""
    hardware = find_profile(flags.hardware).with_budget(
        gpu_memory=flags.gpu_memory, cpu_memory=flags.cpu_memory, disk=flags.disk
    )
    check_margin(flags.margin)
    return Question(
        hardware=hardware,
        model=choose_dtype(load_model_spec(flags.model), hardware, flags.dtype),
        workload=read_workload(flags),
        margin=flags.margin,
        permitted=read_permitted(flags),
    )


def check_margin(margin: float) -> None:
    """Refuse a margin that leaves nothing to use, or less than nothing free."""
    if not 0 <= margin < 1:
        raise InputError("--margin", got=margin, allowed="a share in [0, 1), such as 0.02")


def check_outputs(flags: argparse.Namespace, *names: str) -> AbstractContextManager[None]:
    """Check the files that the flags ``names`` tell a command to write, before any work.

    None may be an input of the other flags. Pipes are open within the block; see
    ``profiles.output_checks.checked_outputs``.
    """
    outputs = {f"--{name}": getattr(flags, name) for name in names}
    inputs = {
        f"--{name}": _files_of(Path(value))
        for name in INPUTS
        if name not in names and (value := getattr(flags, name, None)) is not None
    }
    return checked_outputs(outputs, inputs)


def check_picture(flag: str, path: Path | None) -> None:
    """Refuse a picture with a suffix of no known format."""
    if path is not None and path.suffix not in PICTURES:
        got = path.suffix or "no suffix"
        raise InputError(f"{flag} {path}", got=got, allowed=", ".join(PICTURES))


def _files_of(path: Path) -> list[Path]:
    """List the files of an input: the file itself, or those of a checkpoint folder."""
    if not path.is_dir():
        return [path]
    return [file for pattern in CHECKPOINT_FILES for file in path.glob(pattern)]


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
