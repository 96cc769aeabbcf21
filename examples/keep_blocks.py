"""Write the outputs of each block when it ends: an interrupt loses only the block it meets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from executor import LLM, SamplingParams
from executor.data import MODEL

PROMPTS = [f"Chapter {number}." for number in range(1, 65)]


def main(model: Path, output: Path = Path("blocks.jsonl")) -> None:
    """Continue the prompts and append each block's outputs to a file."""
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1)
    with LLM(model) as llm, output.open("w") as file:
        for block in llm.iter_blocks(PROMPTS, params):
            for result in block:
                line = {"index": result.index, "text": result.outputs[0].text}
                file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{len(block)} more outputs are in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
