"""The command ``python -m costmodel.search``: solve for the best policy and write it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from costmodel.cli.flags import (
    Question,
    add_question_flags,
    check_outputs,
    check_picture,
    read_question,
)
from costmodel.cli.policy_report import format_explanation, format_prediction
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.optimizer.optimum import Search, SearchResult
from costmodel.optimizer.whatif import what_would_change
from profiles.command import Parser, run
from profiles.files import to_json
from profiles.output_checks import output_path
from profiles.start import called
from profiles.units import format_figure

# A smaller gain of fewer bits is not worth a word.
LEAST_RATIO = 1.02


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="costmodel.search",
        description="Find the placement and the block size with the highest throughput.",
        example="python -m costmodel.search --hardware profile.json --model llama-3.1-8b"
        " --num-prompts 256 --cpu-memory 16GiB",
    )
    add_question_flags(parser)
    add = parser.add_argument
    parser.add_seconds(
        "--max-latency", help="longest duration of one block, such as 10min (default: no limit)"
    )
    add(
        "--output",
        type=output_path,
        default=Path("policy.json"),
        help="policy to write (default: policy.json)",
    )
    add(
        "--explain",
        action="store_true",
        help="also print the bound, seconds, memory, and the value of more hardware",
    )
    add("--plot", type=output_path, metavar="FILE", help="draw the policy, as .png, .svg or .pdf")
    add("--report", type=output_path, metavar="FILE", help="write a report of the policy, as .html")
    add("--json", action="store_true", help="print the policy as one line of JSON at the end")
    return parser


def main(arguments: list[str]) -> None:
    """Search, print, write."""
    flags = parser().parse_args(arguments)
    check_picture("--plot", flags.plot)
    with check_outputs(flags, "output", "plot", "report"):
        _search(flags)


def _search(flags: argparse.Namespace) -> None:
    question = read_question(flags)
    search = Search(
        question.hardware,
        question.model,
        question.workload,
        max_latency_s=flags.max_latency,
        margin=question.margin,
    )
    result = search.run(question.permitted)
    result.policy.save(flags.output)
    print(format_prediction(result.policy, result.hardware, result.predicted))
    if question.permitted == DEFAULT_PERMITTED:
        _tell_of_four_bits(search, result)
    if flags.explain or flags.report is not None:
        _tell_more(search, question, result, flags)
    if flags.plot is not None:
        _plot(result, flags.plot)
    print(f"\npolicy written to {flags.output}")
    if flags.json:
        print(json.dumps(to_json(result.policy)))


def _tell_of_four_bits(search: Search, result: SearchResult) -> None:
    """Say what quantization would yield, which is not done unasked: it changes outputs.

    Weights whose checkpoint is quantized keep their bits.
    """
    if not result.hardware.knows_unpacking:
        return
    # What full precision is permitted to, four bits can at worst leave as it is.
    weight_bits = (16,) if result.policy.model.is_encoded else (16, 4)
    other = search.run(Permitted(weight_bits=weight_bits, cache_bits=(16, 4)))
    policy = other.policy
    ratio = other.job_tok_per_s / result.job_tok_per_s
    if not policy.is_compressed or ratio < LEAST_RATIO:
        print("\nfewer bits would not be faster")
        return
    bits, flags = f"{policy.cache_bits} bits for the cache", "--cache-bits 16,4"
    if 4 in weight_bits:
        bits = f"{policy.weight_bits} bits for weights and {policy.cache_bits} for the cache"
        flags = f"--weight-bits 16,4 {flags}"
    print(
        f"\nwith {bits} it would be {format_figure(other.job_tok_per_s)} token/s"
        f" ({ratio:.2f} x): {flags}; {called('executor.evaluate')} measures the effect on outputs"
    )


def _tell_more(
    search: Search, question: Question, result: SearchResult, flags: argparse.Namespace
) -> None:
    """Search on other machines too, and tell of them on the terminal or on a page."""
    changes = what_would_change(search, result, permitted=question.permitted)
    if flags.explain:
        print()
        print(format_explanation(result, changes))
    if flags.report is not None:
        # As with plots, only those who ask wait for the import of what draws.
        from costmodel.report.page import write_search_page

        write_search_page(flags.report, result, changes)
        print(f"\nreport written to {flags.report}")


def _plot(result: SearchResult, path: Path) -> None:
    # Drawing takes as long to import as a search to run, so only those who ask wait for it.
    from costmodel.cli.plots import plot_policy, save_figure

    save_figure(plot_policy(result), path)
    print(f"\nplot written to {path}")


if __name__ == "__main__":
    run(main)
