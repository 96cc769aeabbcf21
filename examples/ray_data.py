"""Answer the prompts of Parquet files on a Ray cluster, into Parquet files: a model a node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from executor import LLM, SamplingParams
from executor.data import MODEL

# Each call of an actor is one run: more prompts use each load of the weights better.
PROMPTS_A_RUN = 512


class Answerer:
    """An actor of Ray Data that holds a model."""

    def __init__(self, model: Path) -> None:
        self._llm = LLM(model, cpu_memory="1GiB", offload_dir=Path.home(), progress=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the column ``answer`` to a batch with the column ``prompt``."""
        outputs = self._llm.generate(batch["prompt"].tolist(), SamplingParams(max_tokens=24))
        return {**batch, "answer": [output.outputs[0].text for output in outputs]}


def main(source: Path, target: Path, model: Path) -> None:
    """Read the files of a folder, and write those of another."""
    num_nodes = sum("CPU" in node["Resources"] for node in ray.nodes() if node["Alive"])
    prompts = ray.data.read_parquet(str(source))
    answers = prompts.map_batches(
        Answerer,
        fn_constructor_args=[model],
        batch_size=PROMPTS_A_RUN,
        # The first one leaves cores to those that read.
        compute=ActorPoolStrategy(min_size=1, max_size=num_nodes),
        num_cpus=1,
    )
    answers.write_parquet(str(target))


if __name__ == "__main__":
    ray.init()
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else MODEL)
