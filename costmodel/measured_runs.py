"""Measured runs as a table: one policy and what a run of it took, a row."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from costmodel.model_spec import load_model_spec
from costmodel.policy import Placement, Policy
from costmodel.workload import Workload
from profiles.emulate import EmulatedGpu
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.outputs import is_stream, write_output
from profiles.packing import DEFAULT_GROUP_SIZE
from profiles.whole_file import Render

COLUMNS = (
    "model", "prompt_len", "gen_len", "gpu_batch_size", "num_gpu_batches", "weights_gpu",
    "weights_cpu", "cache_gpu", "cache_cpu", "activations_gpu", "activations_cpu", "weight_bits",
    "cache_bits", "cpu_attention", "throughput_tok_per_s",
)  # fmt: skip
# Fractions of a table carry few digits.
FRACTION_DIGITS = 9
# Between a throughput and what the phases say.
MOST_APART = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A policy and what one block of it took.

    Parameters
    ----------
    throughput_tok_per_s
        Generated tokens over the seconds of both phases.
    prefill_s, decode_s
        Seconds of the phases; 0 where they were not measured apart.
    emulated
        The GPU tier, where it was emulated on a machine without a GPU.
    """

    policy: Policy
    throughput_tok_per_s: float
    prefill_s: float = 0.0
    decode_s: float = 0.0
    emulated: EmulatedGpu | None = None

    def __post_init__(self) -> None:
        if not 0 < self.throughput_tok_per_s < float("inf"):
            raise InputError(
                "throughput_tok_per_s", got=self.throughput_tok_per_s, allowed="above 0"
            )
        for name in ("prefill_s", "decode_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(name, got=getattr(self, name), allowed="0 or more")
        is_apart = self.prefill_s > 0, self.decode_s > 0
        if any(is_apart) and is_apart != (True, self.policy.workload.gen_len > 1):
            raise InputError(
                "prefill_s and decode_s", got=f"{self.prefill_s} and {self.decode_s}",
                allowed="both, or neither; with one token to generate, prefill_s alone",
            )  # fmt: skip
        num_tokens = self.policy.block_size * self.policy.workload.gen_len
        implied = num_tokens / (self.prefill_s + self.decode_s) if self.prefill_s else None
        if implied and not 1 / MOST_APART < self.throughput_tok_per_s / implied < MOST_APART:
            raise InputError(
                "throughput_tok_per_s", got=self.throughput_tok_per_s,
                allowed=f"{num_tokens} tokens over prefill_s and decode_s, {implied:.4g}",
            )  # fmt: skip

    def machine(self, hardware: HardwareProfile) -> HardwareProfile:
        """Return the machine that it ran on: ``hardware``, with its emulated GPU if it had one."""
        return self.emulated.beside(hardware) if self.emulated else hardware


def read_runs(
    path: Path,
    *,
    check: Callable[[MeasuredRun], None] = lambda run: None,
    skip: Callable[[InputError], None] | None = None,
) -> list[MeasuredRun]:
    """Read a CSV file with the columns ``COLUMNS``, and others that it may have.

    Fractions not on the GPU or the CPU are on disk. Columns that may be missing, or empty in a row:
    ``dtype`` (else the model's own), ``prefill_batch_size`` (else whole batches were prefilled at
    once), ``group_size`` (64), ``attention_sparsity`` (1), ``prefill_s`` and ``decode_s`` (else
    both phases count as one), ``emulated_gpu_bytes`` and ``emulated_link_bytes_per_s``, and
    ``unpacks_per_batch``: 0 for runs that unpack quantized weights once for every load; without it
    they unpack for every batch, as FlexGen does. All others are ignored.

    Parameters
    ----------
    check
        Called with each run; an ``InputError`` of it is one of the line.
    skip
        Called with the error of each line that cannot be used, which is then left out.

    Raises
    ------
    InputError
        When a column is missing or there is no row; without ``skip``, also with the line of the
        first value that is out of place.
    """
    table = _Table.read(path)
    if missing := [name for name in COLUMNS if table.header and name not in table.header]:
        raise InputError(
            f"runs {path}", got=f"no column {missing[0]!r}", allowed=", ".join(COLUMNS)
        )
    runs = []
    for number, line in table.lines.items():
        try:
            run = _run_of(table.header, line)
            check(run)
        except InputError as error:
            told = error.inside(f"runs {path}, line {number}")
            if skip is None:
                raise told from None
            skip(told)
        else:
            runs.append(run)
    if not runs and skip is None:
        raise InputError(f"runs {path}", got="no rows", allowed="one run a row")
    return runs


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as a CSV file that ``read_rows`` reads, whole or not at all."""
    columns = dict.fromkeys(name for row in rows for name in row)

    def render(handle: IO[str]) -> None:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    write_output(path, render)


def append_row(
    path: Path,
    row: Mapping[str, object],
    *,
    most: int = sys.maxsize,
    write: Callable[[Path, Render], None] = write_output,
) -> None:
    """Add a row to a table, which begins with it where there is no file yet; of more than ``most``
    rows the oldest go. The other lines stay as they are, even those that cannot be read."""
    table = _table_so_far(path)
    added = [name for name in row if name not in table.header]
    columns = [*table.header, *added]
    old = [line + "," * len(added) for line in table.lines.values()]

    def render(handle: IO[str]) -> None:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        handle.writelines(f"{line}\n" for line in old[max(0, len(old) + 1 - most) :])
        writer.writerow(row)

    write(path, render)


def check_table(path: Path) -> None:
    """Raise ``InputError`` where a row cannot be added, before the work that the row tells of."""
    _table_so_far(path)


def _table_so_far(path: Path) -> _Table:
    """Read the lines that a table has; a pipe or a device has none."""
    if is_stream(path) or not path.exists():
        return _Table(header=[], lines={})
    return _Table.read(path)


def row_of(run: MeasuredRun, *, model: str | None = None) -> dict[str, object]:
    """Return a run as a row; ``model`` is a preset, a checkpoint folder or a ``config.json``
    (by default the name in the policy, which must be a preset then)."""
    policy = run.policy
    placements = {
        f"{kind}_{tier}": round(getattr(getattr(policy, kind), tier), FRACTION_DIGITS)
        for kind in ("weights", "cache", "activations")
        for tier in ("gpu", "cpu")
    }
    return {
        "model": model or policy.model.name,
        "dtype": policy.model.dtype,
        "prompt_len": policy.workload.prompt_len,
        "gen_len": policy.workload.gen_len,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "prefill_batch_size": policy.prefill_batch_size,
        **placements,
        "weight_bits": policy.weight_bits,
        "cache_bits": policy.cache_bits,
        "group_size": policy.group_size,
        "unpacks_per_batch": int(policy.unpacks_per_batch),
        "attention_sparsity": policy.attention_sparsity,
        "cpu_attention": policy.cpu_attention,
        "emulated_gpu_bytes": run.emulated and run.emulated.memory_bytes,
        "emulated_link_bytes_per_s": run.emulated and run.emulated.link_bytes_per_s,
        "throughput_tok_per_s": run.throughput_tok_per_s,
        "prefill_s": run.prefill_s,
        "decode_s": run.decode_s,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """The lines of a table as they are; ``lines`` are those with something in them, by number."""

    header: list[str]
    lines: Mapping[int, str]

    @classmethod
    def read(cls, path: Path) -> _Table:
        """Raises ``InputError`` where there is no file or its first line is broken."""
        try:
            # Bytes that are no text spoil their own line alone.
            text = path.read_text(encoding="utf-8-sig", errors="replace")
        except FileNotFoundError:
            raise InputError(f"runs {path}", got="no such file", allowed="a CSV file") from None
        except OSError as error:
            raise InputError(f"runs {path}", got=error, allowed="a CSV file") from None
        first, *rest = text.split("\n")
        try:
            header = _cells(first)
        except InputError as error:
            raise error.inside(f"runs {path}, line 1") from None
        return cls(header=header, lines={i: line for i, line in enumerate(rest, 2) if line.strip()})


def _cells(line: str) -> list[str]:
    """Split a line; a cell never holds the end of one."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise InputError("cells", got=error, allowed="comma-separated values") from None


def _run_of(header: Sequence[str], line: str) -> MeasuredRun:
    cells = _cells(line)
    # A line that was cut would else be read as one with empty cells.
    if len(cells) != len(header):
        raise InputError(
            "cells", got=len(cells), allowed=f"{len(header)}, one for each column of line 1"
        )
    try:
        return _Row(dict(zip(header, cells, strict=True))).as_run()
    except (TypeError, ValueError) as error:
        raise InputError("values", got=error, allowed="numbers") from None


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a table, and its values as what they stand for."""

    values: Mapping[str, str]

    def as_run(self) -> MeasuredRun:
        emulated = None
        if self._is_given("emulated_gpu_bytes"):
            emulated = EmulatedGpu(
                memory_bytes=self._count("emulated_gpu_bytes"),
                link_bytes_per_s=self._number("emulated_link_bytes_per_s"),
            )
        return MeasuredRun(
            policy=self._policy(),
            throughput_tok_per_s=self._number("throughput_tok_per_s"),
            prefill_s=self._number("prefill_s", default=0.0),
            decode_s=self._number("decode_s", default=0.0),
            emulated=emulated,
        )

    def _policy(self) -> Policy:
        model = load_model_spec(self.values["model"])
        if self._is_given("dtype"):
            model = model.with_dtype(self.values["dtype"])
        batch = self._count("gpu_batch_size")
        return Policy(
            model=model,
            workload=Workload(prompt_len=self._count("prompt_len"), gen_len=self._count("gen_len")),
            gpu_batch_size=batch,
            num_gpu_batches=self._count("num_gpu_batches"),
            prefill_batch_size=self._count("prefill_batch_size", default=batch),
            weights=self._placement("weights"),
            cache=self._placement("cache"),
            activations=self._placement("activations"),
            weight_bits=self._count("weight_bits"),
            cache_bits=self._count("cache_bits"),
            group_size=self._count("group_size", default=DEFAULT_GROUP_SIZE),
            unpacks_per_batch=self._number("unpacks_per_batch", default=1) > 0,
            attention_sparsity=self._number("attention_sparsity", default=1.0),
            cpu_attention=self._number("cpu_attention"),
        )

    def _is_given(self, name: str) -> bool:
        return bool(self.values.get(name))

    def _number(self, name: str, *, default: float | None = None) -> float:
        if default is not None and not self._is_given(name):
            return default
        if not self._is_given(name):
            raise InputError(name, got="nothing", allowed="a number")
        try:
            value = float(self.values[name])
        except ValueError:
            raise InputError(name, got=self.values[name], allowed="a number") from None
        if not math.isfinite(value):
            raise InputError(name, got=value, allowed="a finite number")
        return value

    def _count(self, name: str, *, default: int | None = None) -> int:
        value = self._number(name, default=default)
        if value != int(value):
            raise InputError(name, got=value, allowed="a whole number")
        return int(value)

    def _placement(self, kind: str) -> Placement:
        gpu, cpu = self._number(f"{kind}_gpu"), self._number(f"{kind}_cpu")
        disk = max(0.0, round(1 - gpu - cpu, FRACTION_DIGITS))
        return Placement(gpu=gpu, cpu=cpu, disk=disk)
