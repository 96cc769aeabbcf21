"""Mixtures of experts on the CPU: grouped products beside the memory's rate and one large product.

The shape is that of Qwen3-30B-A3B. Rounds take turns: memory, then every case, so that a machine
shared with others counts the same for all. Medians of the rounds' ratios are told. A grouped
product reads the weights of all its experts once: its rate is held against that at which torch sums
a large tensor. With many rows, it is held against one product of as many FLOP. ``layer`` is a whole
mixture beside its products alone: what routing, sorting and adding cost. Progress goes to stderr,
one JSON line with every figure to stdout.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from decode_attention import STREAM_BYTES, WINDOW_S
from workload_run import BenchParser, circumstances, keep_result

from costmodel.families import preset_config, spec_from_config
from costmodel.model.feed_forward_spec import ExpertsSpec
from executor.model.experts import experts_output, route
from executor.model.matrices import Matrix, PackedRows, multiply_groups
from profiles.command import run
from profiles.encodings import find_encoding
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix
from profiles.packing import Packing

PRESET = "qwen3-30b-a3b"
PLAIN, OWN = "bfloat16", "own 4 bits"
ENCODINGS = ("Q4_K", "Q4_0", "MXFP4")
# Rows of each expert; and their mean where few experts have most of them.
ROWS, SKEWED_ROWS = (1, 4, 16, 64), (4, 16)
# Shares of rows fall as this power of an expert's rank.
SKEW = 0.7
# Rows and experts of the product that is held against one matrix.
MANY_ROWS, FEW_EXPERTS = 256, 8
# Tokens of a layer: a pass of decode, and of prefill.
TOKENS = (8, 64, 2048)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The stacked matrices of a layer's experts, in one form."""

    gate_up: Sequence[Matrix]
    down: Sequence[Matrix]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(_stored(matrices[0]).nbytes for matrices in (self.gate_up, self.down))


def main(arguments: list[str]) -> None:
    """Measure, print the table and the line."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 3:
        raise InputError("--rounds", got=flags.rounds, allowed="3 or more")
    spec, hidden = _shape()
    if flags.one_thread:
        torch.set_num_threads(1)
    names = flags.encoding or [PLAIN, OWN, *ENCODINGS]
    with torch.inference_mode():
        cases = [case for name in names for case in _cases_of(name, spec, hidden, flags.rounds)]
    result = {
        "benchmark": "mixtures of experts",
        "shape": PRESET,
        "rounds": flags.rounds,
        "threads": torch.get_num_threads(),
        "cases": cases,
        **circumstances("experts.py", arguments, "torch"),
    }
    keep_result(flags, result)


def _parser() -> BenchParser:
    parser = BenchParser(
        "experts.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--result tests/bench/results/experts.json",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of which the median counts (9)")
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="measure one thread by its CPU time, which programs beside it change less",
    )
    parser.add_argument(
        "--encoding", action="append", help="one form of the weights only; may be repeated"
    )
    return parser


def _shape() -> tuple[ExpertsSpec, int]:
    model = spec_from_config(preset_config(PRESET), name=PRESET)
    experts = model.layer(0).experts
    assert experts is not None
    return experts, model.hidden_size


def _cases_of(name: str, spec: ExpertsSpec, hidden: int, rounds: int) -> list[dict[str, Any]]:
    """Measure all cases of weights in one form."""
    mixture = _mixture(name, spec, hidden)
    stream = torch.ones(STREAM_BYTES // 4)
    works: dict[str, Callable[[], object]] = {"memory": stream.sum}
    amounts = {"memory": stream.nbytes}
    counts = {f"{rows} rows": [rows] * spec.num_experts for rows in ROWS}
    counts |= {f"{rows} rows, skewed": _skewed(rows, spec.num_experts) for rows in SKEWED_ROWS}
    for case, rows in counts.items():
        works[case] = _products(mixture, rows, hidden, spec)
        amounts[case] = mixture.expert_bytes * sum(count > 0 for count in rows)
    many = f"{MANY_ROWS} rows"
    works[many] = _products(mixture, [MANY_ROWS] * FEW_EXPERTS, hidden, spec)
    works["one matrix"] = _products(mixture, [MANY_ROWS * FEW_EXPERTS], hidden, spec)
    flop = 2 * MANY_ROWS * FEW_EXPERTS * 3 * hidden * spec.expert.size
    amounts |= {many: flop, "one matrix": flop}
    layers = _layer_works(mixture, spec, hidden) if name in (PLAIN, OWN) else {}
    works |= layers
    amounts |= dict.fromkeys(layers, 1)
    found: dict[str, list[float]] = {case: [] for case in works}
    for _ in range(rounds):
        for case, work in works.items():
            found[case].append(_rate(work, amounts[case]))
    cases = [_beside(name, case, found, "memory") for case in counts]
    cases.append(_beside(name, many, found, "one matrix"))
    for case in layers:
        if case.startswith("layer"):
            cases.append(_beside(name, case, found, case.replace("layer", "products")))
    return cases


def _rate(work: Callable[[], object], amount: int) -> float:
    """Repeat for a window, and return amounts per second: of CPU time where one thread works."""
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    work()
    start, count = clock(), 0
    while (passed := clock() - start) < WINDOW_S:
        work()
        count += 1
    return count * amount / passed


def _beside(
    name: str, case: str, found: Mapping[str, Sequence[float]], other: str
) -> dict[str, Any]:
    """Tell a case's rate, and the median of its ratios to another's."""
    ratio = statistics.median(a / b for a, b in zip(found[case], found[other], strict=True))
    rate = statistics.median(found[case])
    print(f"{name:>12} {case:>22}: {ratio:5.2f} of {other}, {rate:.4g}/s", file=sys.stderr)
    return {
        "weights": name,
        "case": case,
        "beside": other,
        "ratio": ratio,
        "per_s": rate,
        "other_per_s": statistics.median(found[other]),
    }


def _mixture(name: str, spec: ExpertsSpec, hidden: int) -> Mixture:
    size = spec.expert.size
    return Mixture(
        gate_up=_matrices(name, spec.num_experts, spec.expert.inner_rows, hidden),
        down=_matrices(name, spec.num_experts, hidden, size),
    )


def _matrices(name: str, count: int, rows: int, width: int) -> list[Matrix]:
    """Return matrices of any bytes.

    Bytes of 32 to 63 make floats of every kind that are neither subnormal nor infinite, and small
    enough for their sums to be finite.
    """
    if name == PLAIN:
        return list(torch.empty(count, rows, width).bfloat16().copy_(_noise(rows, width)))
    packing = Packing(num_elements=width, bits=4)
    encoding = None if name == OWN else find_encoding(name)
    row_bytes = packing.row_bytes if encoding is None else encoding.row_bytes(width)
    block = torch.randint(32, 64, (rows, row_bytes), dtype=torch.uint8)
    stored = block.expand(count, -1, -1).contiguous()
    if encoding is None:
        return [PackedRows(matrix, packing) for matrix in stored]
    return [EncodedMatrix(rows=m, encoding=encoding, num_elements=width) for m in stored]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape).div_(shape[-1] ** 0.5).bfloat16()


def _skewed(mean: int, count: int) -> list[int]:
    """Return rows of experts whose shares fall as a power of their rank, in random order."""
    shares = [(rank + 1) ** -SKEW for rank in range(count)]
    rows = [round(mean * count * share / sum(shares)) for share in shares]
    random.Random(0).shuffle(rows)
    return rows


def _products(
    mixture: Mixture, counts: Sequence[int], hidden: int, spec: ExpertsSpec
) -> Callable[[], object]:
    """Return both products of all experts, with so many rows of each."""
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    groups = [(e, slice(ends[e], ends[e + 1])) for e, count in enumerate(counts) if count]
    x, inner = _noise(ends[-1], hidden), _noise(ends[-1], spec.expert.inner_rows)
    out = torch.empty_like(x)

    def multiply() -> None:
        multiply_groups(x, mixture.gate_up, groups, inner)
        multiply_groups(inner[:, : spec.expert.size], mixture.down, groups, out)

    return multiply


def _layer_works(
    mixture: Mixture, spec: ExpertsSpec, hidden: int
) -> dict[str, Callable[[], object]]:
    """Return whole mixtures of several numbers of tokens, and their products alone."""
    weights = {
        "router.weight": [_noise(spec.num_experts, hidden)],
        "expert_gate_up.weight": mixture.gate_up,
        "expert_down.weight": mixture.down,
    }
    works: dict[str, Callable[[], object]] = {}
    for tokens in TOKENS:
        x = _noise(tokens, hidden)
        counts = route(x, weights, spec).counts(spec.num_experts).tolist()
        works[f"layer, {tokens} tokens"] = partial(_run_layer, x, weights, spec)
        works[f"products, {tokens} tokens"] = _products(mixture, counts, hidden, spec)
    return works


def _run_layer(x: torch.Tensor, weights: Mapping[str, Sequence[Matrix]], spec: ExpertsSpec) -> None:
    experts_output(x, route(x, weights, spec), weights, spec)


def _stored(matrix: Matrix) -> torch.Tensor:
    return matrix if isinstance(matrix, torch.Tensor) else matrix.rows


if __name__ == "__main__":
    run(main)
