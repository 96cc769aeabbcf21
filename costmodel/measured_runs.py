"""Measured runs as a table: one policy and its throughput a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from costmodel.model_spec import load_model_spec
from costmodel.policy import Placement, Policy
from costmodel.workload import Workload
from profiles.errors import InputError

COLUMNS = (
    "model", "prompt_len", "gen_len", "gpu_batch_size", "num_gpu_batches", "weights_gpu",
    "weights_cpu", "cache_gpu", "cache_cpu", "activations_gpu", "activations_cpu", "weight_bits",
    "cache_bits", "cpu_attention", "throughput_tok_per_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A policy and the throughput that a run of it reached, in generated token/s."""

    policy: Policy
    throughput_tok_per_s: float

    def __post_init__(self) -> None:
        if not 0 < self.throughput_tok_per_s < float("inf"):
            raise InputError(
                "throughput_tok_per_s", got=self.throughput_tok_per_s, allowed="above 0"
            )


def read_runs(path: Path) -> list[MeasuredRun]:
    """Read a CSV file with the columns ``COLUMNS``; others are ignored.

    Fractions not on the GPU or the CPU are on disk. An optional column ``prefill_batch_size``
    says how many sequences were prefilled at once; without it, whole batches were. Another,
    ``unpacks_per_batch``, is 0 for runs that unpack quantized weights once for every load;
    without it, they unpack for every batch, as FlexGen does.

    Raises
    ------
    InputError
        With the file's row, when a column is missing or a value out of place.
    """
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise InputError(f"runs {path}", got="no such file", allowed="a CSV file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"runs {path}", got=error, allowed="a CSV file") from None
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise InputError(
            f"runs {path}", got=f"no column {missing[0]!r}", allowed=", ".join(COLUMNS)
        )
    if table.empty:
        raise InputError(f"runs {path}", got="no rows", allowed="one run a row")
    runs = []
    for number, row in enumerate(table.to_dict("records"), start=2):
        try:
            runs.append(_run_of(row))
        except InputError as error:
            raise error.inside(f"runs {path}, line {number}") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"runs {path}, line {number}", got=error, allowed="numbers") from None
    return runs


def _run_of(row: dict[object, object]) -> MeasuredRun:
    values = {str(name): value for name, value in row.items()}

    def number(name: str) -> float:
        value = float(str(values[name]))
        if not math.isfinite(value):
            raise InputError(name, got=value, allowed="a finite number")
        return value

    def is_given(name: str) -> bool:
        return name in values and not pd.isna(values[name])  # type: ignore[call-overload]

    def count(name: str) -> int:
        value = number(name)
        if value != int(value):
            raise InputError(name, got=value, allowed="a whole number")
        return int(value)

    def placement(kind: str) -> Placement:
        gpu, cpu = number(f"{kind}_gpu"), number(f"{kind}_cpu")
        # Fractions of a table carry few digits.
        return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, round(1 - gpu - cpu, 9)))

    batch = count("gpu_batch_size")
    prefill = count("prefill_batch_size") if is_given("prefill_batch_size") else batch
    per_batch = not is_given("unpacks_per_batch") or number("unpacks_per_batch") > 0
    policy = Policy(
        model=load_model_spec(str(values["model"])),
        workload=Workload(prompt_len=count("prompt_len"), gen_len=count("gen_len")),
        gpu_batch_size=batch,
        num_gpu_batches=count("num_gpu_batches"),
        prefill_batch_size=prefill,
        weights=placement("weights"),
        cache=placement("cache"),
        activations=placement("activations"),
        cpu_attention=number("cpu_attention"),
        weight_bits=count("weight_bits"),
        cache_bits=count("cache_bits"),
        unpacks_per_batch=per_batch,
    )
    return MeasuredRun(policy=policy, throughput_tok_per_s=number("throughput_tok_per_s"))
