"""Measured runs as a table: each row is a policy and the duration of a run of it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from costmodel.calibration.run_lengths import RunLengths
from costmodel.calibration.runs_table import FRACTION_DIGITS, Row, RunsTable
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import overall_weights
from profiles.emulate import EmulatedGpu
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.outputs import is_stream, write_output
from profiles.whole_file import Render

COLUMNS = (
    "model",
    "prompt_len",
    "gen_len",
    "gpu_batch_size",
    "num_gpu_batches",
    "weights_gpu",
    "weights_cpu",
    "cache_gpu",
    "cache_cpu",
    "activations_gpu",
    "activations_cpu",
    "weight_bits",
    "cache_bits",
    "cpu_attention",
    "throughput_tok_per_s",
)
# Ratio of a throughput to the one that the phases imply, or its inverse.
MOST_APART = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A policy and the duration of one block of it, or of a whole run over lanes.

    Parameters
    ----------
    throughput_tok_per_s
        Generated tokens over the seconds of both phases.
    prefill_s, decode_s
        Seconds of the phases; 0 if they were not measured separately.
    emulated
        The GPU tier, if it was emulated on a machine without a GPU.
    lengths
        Those of a run over lanes, which has no phases.
    """

    policy: Policy
    throughput_tok_per_s: float
    prefill_s: float = 0.0
    decode_s: float = 0.0
    emulated: EmulatedGpu | None = None
    lengths: RunLengths | None = None

    def __post_init__(self) -> None:
        if not 0 < self.throughput_tok_per_s < float("inf"):
            raise InputError(
                "throughput_tok_per_s", got=self.throughput_tok_per_s, allowed="above 0"
            )
        for name in ("prefill_s", "decode_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(name, got=getattr(self, name), allowed="0 or more")
        if (self.lengths is None) != (self.policy.lanes is None):
            raise InputError(
                "lengths",
                got="nothing" if self.lengths is None else "those of prompts",
                allowed="the lengths of a run over lanes, and of no other",
            )
        is_apart = self.prefill_s > 0, self.decode_s > 0
        if any(is_apart) and is_apart != self._phases_measured:
            raise InputError(
                "prefill_s and decode_s",
                got=f"{self.prefill_s} and {self.decode_s}",
                allowed="both, or neither; with one token to generate, prefill_s alone",
            )
        implied = self.num_tokens / (self.prefill_s + self.decode_s) if self.prefill_s else None
        if implied and not 1 / MOST_APART < self.throughput_tok_per_s / implied < MOST_APART:
            raise InputError(
                "throughput_tok_per_s",
                got=self.throughput_tok_per_s,
                allowed=f"{self.num_tokens} tokens over prefill_s and decode_s, {implied:.4g}",
            )

    @property
    def _phases_measured(self) -> tuple[bool, bool]:
        """Whether prefill and decode take time, if they are measured apart."""
        return self.lengths is None, self.lengths is None and self.policy.workload.gen_len > 1

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated."""
        if self.lengths is not None:
            return self.lengths.num_tokens
        return self.policy.block_size * self.policy.workload.gen_len

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

    Fractions not on the GPU or the CPU are on disk. Other columns are ignored, except those below.
    Each may be missing, or empty in a row:

    - ``dtype``: else the model's own.
    - ``prefill_batch_size``: else that of a whole batch.
    - ``group_size``: else 64.
    - ``attention_sparsity``: else 1.
    - ``prefill_s`` and ``decode_s``: else both phases count as one.
    - ``emulated_gpu_bytes`` and ``emulated_link_bytes_per_s``: else no GPU was emulated.
    - ``cpu_experts``, ``loads_on_demand``, ``expert_skew``: as in the policy and its workload; 0
      where they are absent.
    - ``weights_NAME_gpu``, ``weights_NAME_cpu``: the placement of one component, where it is not
      that of all weights.
    - ``pool_tokens``, ``pass_rows``, ``chunk_rows``, ``lengths``: of a run over lanes, see
      ``LanePolicy`` and ``RunLengths``.
    - ``unpacks_per_batch``: 0 if quantized weights are unpacked once for every load. Else they are
      unpacked for every batch, as in FlexGen.

    Parameters
    ----------
    check
        Called with each run. Its ``InputError`` counts as an error of the line.
    skip
        Called with the error of each line that cannot be used. Such lines are left out.

    Raises
    ------
    InputError
        If a column is missing or there is no row. Without ``skip``, also for the first line that
        cannot be used.
    """
    table = RunsTable.read(path)
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


def append_row(
    path: Path,
    row: Mapping[str, object],
    *,
    most: int = sys.maxsize,
    write: Callable[[Path, Render], None] = write_output,
) -> None:
    """Add a row to a table. Makes the file if there is none.

    Removes the oldest rows beyond ``most``. Keeps other lines, even those that cannot be read.
    """
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
    """Raise ``InputError`` if a row could not be added; called before the run."""
    _table_so_far(path)


def _table_so_far(path: Path) -> RunsTable:
    """Read the lines of a table; a pipe or a device has none."""
    if is_stream(path) or not path.exists():
        return RunsTable(header=[], lines={})
    return RunsTable.read(path)


def row_of(run: MeasuredRun, *, model: str | None = None) -> dict[str, object]:
    """Return a run as a row.

    ``model`` is a preset, a checkpoint folder or a ``config.json``. The default is the name in the
    policy, which must then be a preset.
    """
    policy = run.policy
    kinds = {"weights": overall_weights(policy), "cache": policy.cache}
    kinds["activations"] = policy.activations
    if len(set(policy.weights.values())) > 1:
        kinds |= {f"weights_{name}": place for name, place in policy.weights.items()}
    placements = {
        f"{kind}_{tier}": round(getattr(placement, tier), FRACTION_DIGITS)
        for kind, placement in kinds.items()
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
        "cpu_experts": policy.cpu_experts,
        "loads_on_demand": int(policy.loads_on_demand),
        "expert_skew": policy.workload.expert_skew,
        "pool_tokens": policy.lanes and policy.lanes.pool_tokens,
        "pass_rows": policy.lanes and policy.lanes.pass_rows,
        "chunk_rows": policy.lanes and policy.lanes.chunk_rows,
        "lengths": run.lengths and str(run.lengths),
        "emulated_gpu_bytes": run.emulated and run.emulated.memory_bytes,
        "emulated_link_bytes_per_s": run.emulated and run.emulated.link_bytes_per_s,
        "throughput_tok_per_s": run.throughput_tok_per_s,
        "prefill_s": run.prefill_s,
        "decode_s": run.decode_s,
    }


def _run_of(header: Sequence[str], line: str) -> MeasuredRun:
    row = Row.read(header, line)
    try:
        return MeasuredRun(
            policy=row.policy(),
            throughput_tok_per_s=row.number("throughput_tok_per_s"),
            prefill_s=row.number("prefill_s", default=0.0),
            decode_s=row.number("decode_s", default=0.0),
            emulated=row.emulated(),
            lengths=row.lengths(),
        )
    except (TypeError, ValueError) as error:
        raise InputError("values", got=error, allowed="numbers") from None
