"""The peer: transformers with disk offload, cohort after cohort, in a process of its own."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers_run import FirstTokenClock, load_model

from profiles.files import write_json
from profiles.runtime import peak_resident_bytes


def main() -> None:
    """Load, generate greedily, write the seconds."""
    parser = argparse.ArgumentParser(description="Run a peer of tests/bench/jobs.py.")
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--dtype", required=True)
    add("--cohorts", type=Path, required=True, help='lines with "prompts" and "passes"')
    add("--most-passes", type=int, required=True, help="of each cohort")
    add("--max-memory", type=int, required=True, help="bytes of weights in memory")
    add("--offload-dir", type=Path, required=True)
    add("--output", type=Path, required=True)
    flags = parser.parse_args()
    model = load_model(flags)
    run_s, is_extrapolated = 0.0, False
    for line in flags.cohorts.read_text(encoding="utf-8").splitlines():
        cohort = json.loads(line)
        passes = min(cohort["passes"], max(2, flags.most_passes))
        prefill_s, decode_s = _generate(model, cohort["prompts"], passes)
        is_extrapolated |= passes < cohort["passes"]
        # A pass reads the weights, and its seconds hardly depend on the context.
        run_s += prefill_s + decode_s * (cohort["passes"] - 1) / max(1, passes - 1)
    write_json(
        flags.output,
        {
            "run_s": run_s,
            "is_extrapolated": is_extrapolated,
            "resident_peak_bytes": peak_resident_bytes(),
        },
    )


def _generate(model: Any, prompts: Sequence[Sequence[int]], passes: int) -> tuple[float, float]:
    """Return the seconds to the first tokens, and those of all others."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    clock = FirstTokenClock()
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=mask,
        min_new_tokens=passes,
        max_new_tokens=passes,
        do_sample=False,
        pad_token_id=0,
        logits_processor=transformers.LogitsProcessorList([clock]),
    )
    end = time.perf_counter()
    assert clock.first_s is not None and output.shape == (len(prompts), longest + passes)
    return clock.first_s - start, end - clock.first_s


if __name__ == "__main__":
    main()
