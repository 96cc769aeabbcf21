"""The text of a table of runs: its lines, its cells, and the values of the cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from costmodel.calibration.run_lengths import RunLengths
from costmodel.model.loading import load_model_spec
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.workload import Workload
from profiles.emulate import EmulatedGpu
from profiles.errors import InputError
from profiles.packing import DEFAULT_GROUP_SIZE

# Fractions of a table carry few digits.
FRACTION_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsTable:
    """The lines of a file of runs, not yet read; ``lines`` omits blank ones and counts from 2."""

    header: list[str]
    lines: Mapping[int, str]

    @classmethod
    def read(cls, path: Path) -> RunsTable:
        """Read a file; raises ``InputError`` if there is none or its first line is broken."""
        try:
            # Bytes that are not UTF-8 make only their own line unreadable.
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


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: its cells by column, and their values.

    Methods raise ``InputError`` with the column of a cell that holds no such value.
    """

    cells: Mapping[str, str]

    @classmethod
    def read(cls, header: Sequence[str], line: str) -> Row:
        """Split a line; raises ``InputError`` unless there is one cell for each column."""
        cells = _cells(line)
        # A line that was cut off must not pass for one with empty cells.
        if len(cells) != len(header):
            raise InputError(
                "cells", got=len(cells), allowed=f"{len(header)}, one for each column of line 1"
            )
        return cls(dict(zip(header, cells, strict=True)))

    def emulated(self) -> EmulatedGpu | None:
        """Return the emulated GPU, if the run had one."""
        if not self._is_given("emulated_gpu_bytes"):
            return None
        return EmulatedGpu(
            memory_bytes=self._count("emulated_gpu_bytes"),
            link_bytes_per_s=self.number("emulated_link_bytes_per_s"),
        )

    def lengths(self) -> RunLengths | None:
        """Return the lengths of a run over lanes."""
        return RunLengths.read(self.cells["lengths"]) if self._is_given("lengths") else None

    def policy(self) -> Policy:
        """Return the policy, which takes the model's own values where cells are empty."""
        model = load_model_spec(self.cells["model"])
        if self._is_given("dtype"):
            model = model.with_dtype(self.cells["dtype"])
        batch = self._count("gpu_batch_size")
        return Policy(
            model=model,
            workload=Workload(
                prompt_len=self._count("prompt_len"),
                gen_len=self._count("gen_len"),
                expert_skew=self.number("expert_skew", default=0.0),
            ),
            gpu_batch_size=batch,
            num_gpu_batches=self._count("num_gpu_batches"),
            prefill_batch_size=self._count("prefill_batch_size", default=batch),
            weights={name: self._weights(name) for name in model.component_names},
            cache=self._placement("cache"),
            activations=self._placement("activations"),
            weight_bits=self._count("weight_bits"),
            cache_bits=self._count("cache_bits"),
            group_size=self._count("group_size", default=DEFAULT_GROUP_SIZE),
            unpacks_per_batch=self.number("unpacks_per_batch", default=1) > 0,
            attention_sparsity=self.number("attention_sparsity", default=1.0),
            cpu_attention=self.number("cpu_attention"),
            cpu_experts=self.number("cpu_experts", default=0.0),
            loads_on_demand=self.number("loads_on_demand", default=0) > 0,
            lanes=self._lanes(),
        )

    def _lanes(self) -> LanePolicy | None:
        if not self._is_given("pool_tokens"):
            return None
        names = ("pool_tokens", "pass_rows", "chunk_rows")
        return LanePolicy(**{name: self._count(name) for name in names})

    def _is_given(self, name: str) -> bool:
        return bool(self.cells.get(name))

    def number(self, name: str, *, default: float | None = None) -> float:
        """Return a finite number; an empty cell is ``default``."""
        if default is not None and not self._is_given(name):
            return default
        if not self._is_given(name):
            raise InputError(name, got="nothing", allowed="a number")
        try:
            value = float(self.cells[name])
        except ValueError:
            raise InputError(name, got=self.cells[name], allowed="a number") from None
        if not math.isfinite(value):
            raise InputError(name, got=value, allowed="a finite number")
        return value

    def _count(self, name: str, *, default: int | None = None) -> int:
        value = self.number(name, default=default)
        if value != int(value):
            raise InputError(name, got=value, allowed="a whole number")
        return int(value)

    def _weights(self, component: str) -> Placement:
        """Return a component's own placement, or that of all weights."""
        own = f"weights_{component}"
        return self._placement(own if self._is_given(f"{own}_gpu") else "weights")

    def _placement(self, kind: str) -> Placement:
        gpu, cpu = self.number(f"{kind}_gpu"), self.number(f"{kind}_cpu")
        disk = max(0.0, round(1 - gpu - cpu, FRACTION_DIGITS))
        return Placement(gpu=gpu, cpu=cpu, disk=disk)


def _cells(line: str) -> list[str]:
    """Split a line into cells, none of which may hold the end of a line."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise InputError("cells", got=error, allowed="comma-separated values") from None
