"""The peer: FlexGen 0.1.8 as it is published, with dummy weights, in a process of its own.

Of the package nothing is changed. Its call for a tokenizer, which would download one, is answered
by a stand-in that gives every prompt the same tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

TOKEN = 5


class FixedTokens:
    """Stands where the tokenizer would."""

    def __call__(self, prompts: Sequence[str], *, max_length: int, **_: object) -> Any:
        """Return ``max_length`` tokens for each prompt."""
        return SimpleNamespace(input_ids=[[TOKEN] * max_length for _ in prompts])


def main() -> None:
    """Cap the GPU's memory, run, print seconds and peaks as one line."""
    parser = argparse.ArgumentParser(description="Run a peer of tests/bench/gpu.py.")
    parser.add_argument("--gpu-memory", type=int, required=True, help="bytes")
    parser.add_argument("--output", type=Path, required=True)
    flags, words = parser.parse_known_args()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, flags.gpu_memory / total))
    tokens = classmethod(lambda cls, *names, **options: FixedTokens())
    transformers.AutoTokenizer.from_pretrained = tokens
    # After the stand-in, which it would take by name.
    from flexgen import flex_opt

    # Neither keeps a log of its own beside the result: the generate timer holds every step.
    theirs = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(theirs)
    flex_opt.run_flexgen(theirs.parse_args([*words, "--log-file", str(flags.output) + ".log"]))
    costs = flex_opt.timers("generate").costs
    figures = {
        "prefill_s": costs[0],
        "decode_s": sum(costs[1:]),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
    }
    flags.output.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
