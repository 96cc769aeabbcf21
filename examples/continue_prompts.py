"""Continue prompts with a model in little memory, and print predicted beside measured."""

from __future__ import annotations

import sys
from pathlib import Path

from executor import LLM, SamplingParams
from executor.data import MODEL

PROMPTS = ["In the beginning", "And the king said unto", "Blessed are they"]


def main(model: Path) -> None:
    """Print each prompt with its continuation, then the report of the run."""
    with LLM(model, cpu_memory="1GiB") as llm:
        for result in llm.generate(PROMPTS, SamplingParams(max_tokens=24)):
            print(f"{result.prompt} ...{result.outputs[0].text}")
        print(llm.report)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
