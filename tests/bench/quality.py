"""What bits, groups and sparsity do to the bundled model's perplexity, at its full context.

Held-out text is scored token by token in decode, by the engine itself. Progress goes to stderr, one
JSON line with every figure to stdout.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from workload_run import BenchParser, circumstances, keep_result

from costmodel.optimizer.choices import Permitted
from costmodel.plan.workload import Workload
from executor.checkpoint.folder import Checkpoint
from executor.data import HELD_OUT, MODEL
from executor.evaluate import compare, plan_job, read_windows, score
from profiles.command import run
from profiles.files import to_json
from profiles.recorded import recorded_profile

PROMPT_LEN = 16
# Bits of weights and cache, group, share of the values read.
CASES = (
    (16, 8, 64, 1.0),
    (16, 4, 64, 1.0),
    (8, 16, 64, 1.0),
    (4, 16, 64, 1.0),
    (8, 8, 64, 1.0),
    (4, 4, 32, 1.0),
    (4, 4, 64, 1.0),
    (4, 4, 128, 1.0),
    (16, 16, 64, 0.25),
    (16, 16, 64, 0.1),
    (4, 4, 64, 0.25),
    (4, 4, 64, 0.1),
)


def main(arguments: list[str]) -> None:
    """Score every case, print the table and the line."""
    parser = BenchParser(
        "quality.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--result tests/bench/results/quality.json",
    )
    parser.add_argument("--windows", type=int, default=32, help="of the text (32)")
    flags = parser.parse_args(arguments)
    hardware, model = recorded_profile("cpu-2core"), MODEL
    source = Checkpoint.open(model)
    work = Workload(prompt_len=PROMPT_LEN, gen_len=source.spec.max_positions - PROMPT_LEN)
    windows = read_windows(HELD_OUT, model, work, flags.windows)
    targets = windows[:, PROMPT_LEN:]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        plain = plan_job(hardware, source, work, windows, Permitted())
        reference = score(plain, Path(folder), targets)
        for weights, cache, group, sparsity in CASES:
            policy = replace(
                plain.policy,
                weight_bits=weights,
                cache_bits=cache,
                group_size=group,
                attention_sparsity=sparsity,
            )
            found = score(replace(plain, policy=policy), Path(folder), targets)
            quality = compare(policy, found, reference)
            cases.append(to_json(quality))
            print(
                f"weights {weights:>2} bits, cache {cache:>2}, groups of {group:>3}, values"
                f" {sparsity:.0%}: perplexity {quality.perplexity:.3f} x {quality.ratio:.4f},"
                f" agreement {quality.agreement:.1%}",
                file=sys.stderr,
                flush=True,
            )
    result = {
        "benchmark": "quality of the bundled model",
        "cases": cases,
        **circumstances("quality.py", arguments, "torch"),
    }
    keep_result(flags, result)


if __name__ == "__main__":
    run(main)
