"""The command ``python -m costmodel.frontier``: latency of a block against throughput."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from costmodel.cli.flags import (
    Question,
    add_question_flags,
    check_outputs,
    check_picture,
    read_question,
)
from costmodel.optimizer.optimum import SearchResult, search
from costmodel.plan.rounding import overall_weights
from costmodel.pricing.price import block_seconds
from profiles.command import Parser, run
from profiles.errors import InfeasibleError, InputError
from profiles.output_checks import output_path
from profiles.units import format_figure, format_seconds

NUM_POINTS = 12
# The shortest latency is found by halving until nothing fits; then it is known to this factor.
HALVINGS = 24
RESOLUTION = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """The fastest policy under one limit on the latency of a block.

    Parameters
    ----------
    max_latency_s
        The limit.
    result
        What the search found under it.
    """

    max_latency_s: float
    result: SearchResult

    @property
    def latency_s(self) -> float:
        """Seconds of one block."""
        return self.result.predicted.latency_s

    @property
    def tok_per_s(self) -> float:
        """Throughput over the whole job."""
        return self.result.job_tok_per_s


def frontier(
    question: Question,
    *,
    num_points: int = NUM_POINTS,
    progress: Callable[[], object] = lambda: None,
) -> list[FrontierPoint]:
    """Sweep the limit on latency from the shortest that anything keeps to none.

    Points that another one beats in both latency and throughput are left out: rounding makes
    some of them. The shortest latency comes first.

    Raises
    ------
    InfeasibleError
        When nothing fits even without a limit.
    """
    best = _search(question, None)
    progress()
    slowest_s = _limited_s(best)
    fastest_s = _shortest_latency(question, slowest_s)
    points = [FrontierPoint(max_latency_s=slowest_s, result=best)]
    for limit_s in np.geomspace(fastest_s, slowest_s, num_points)[:-1]:
        try:
            result = _search(question, float(limit_s))
        except InfeasibleError:
            # Between two limits that can be kept, rounding may leave one that cannot.
            continue
        finally:
            progress()
        points.append(FrontierPoint(max_latency_s=float(limit_s), result=result))
    return _undominated(points)


def _shortest_latency(question: Question, kept_s: float) -> float:
    """Return a limit that a policy keeps, within ``RESOLUTION`` of one that none keeps."""
    refused_s = 0.0
    for _ in range(HALVINGS):
        tried_s = kept_s / 2 if refused_s == 0 else float(np.sqrt(kept_s * refused_s))
        try:
            kept_s = _limited_s(_search(question, tried_s))
        except InfeasibleError:
            refused_s = tried_s
        if refused_s and kept_s < refused_s * RESOLUTION:
            break
    return kept_s


def _limited_s(result: SearchResult) -> float:
    """Return the latency that the program limits: it does not count waits."""
    return block_seconds(result.policy, result.hardware)


def _search(question: Question, max_latency_s: float | None) -> SearchResult:
    return search(
        question.hardware,
        question.model,
        question.workload,
        max_latency_s=max_latency_s,
        margin=question.margin,
        permitted=question.permitted,
    )


def _undominated(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.latency_s, -point.tok_per_s)):
        if not kept or point.tok_per_s > kept[-1].tok_per_s:
            kept.append(point)
    return kept


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="costmodel.frontier",
        description="Search the best policy for each of several limits on the latency of a block.",
        example="python -m costmodel.frontier --hardware profile.json --model llama-3.1-8b"
        " --plot frontier.png",
    )
    add_question_flags(parser)
    add = parser.add_argument
    add(
        "--points",
        type=int,
        default=NUM_POINTS,
        help=f"number of latency limits to try (default: {NUM_POINTS})",
    )
    add(
        "--plot",
        type=output_path,
        metavar="FILE",
        help="draw throughput over latency, as .png, .svg or .pdf",
    )
    add("--json", action="store_true", help="print the points as one line of JSON at the end")
    return parser


def main(arguments: list[str]) -> None:
    """Sweep, print, draw."""
    flags = parser().parse_args(arguments)
    if flags.points < 2:
        raise InputError("--points", got=flags.points, allowed="2 or more")
    check_picture("--plot", flags.plot)
    with check_outputs(flags, "plot"):
        _sweep(flags)


def _sweep(flags: argparse.Namespace) -> None:
    question = read_question(flags)
    with tqdm(total=flags.points, desc="searching", leave=False, disable=None) as bar:
        points = frontier(question, num_points=flags.points, progress=bar.update)
    print(format_frontier(points))
    if flags.plot is not None:
        # Drawing takes longer to import than a search to run.
        from costmodel.cli.plots import plot_frontier, save_figure

        save_figure(plot_frontier(points), flags.plot)
        print(f"\nplot written to {flags.plot}")
    if flags.json:
        print(json.dumps({"points": [_figures(point) for point in points]}))


def format_frontier(points: Sequence[FrontierPoint]) -> str:
    """Lay out one point a line, the shortest latency first."""
    lines = [f"{'a block in':>14}{'token/s':>10}{'block':>12}{'weights':>20}  limited by"]
    for point in points:
        policy = point.result.policy
        block = f"{policy.gpu_batch_size} x {policy.num_gpu_batches}"
        shares = overall_weights(policy)
        weights = " ".join(f"{getattr(shares, t):.0%}" for t in ("gpu", "cpu", "disk"))
        lines.append(
            f"{format_seconds(point.latency_s):>14}"
            f"{format_figure(point.tok_per_s, 4):>10}{block:>12}"
            f"{weights:>20}  {point.result.predicted.bottleneck}"
        )
    return "\n".join([*lines, "", "weights are shares on GPU, CPU and disk"])


def _figures(point: FrontierPoint) -> dict[str, float | int]:
    policy = point.result.policy
    return {
        "latency_s": point.latency_s,
        "throughput_tok_per_s": point.tok_per_s,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
    }


if __name__ == "__main__":
    run(main)
