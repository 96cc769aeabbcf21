"""The workload of a drawn job, for runs of all systems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drawn_job import DrawnJob, write_tokenizer
from workload_run import Bench


@dataclass(frozen=True, slots=True, kw_only=True)
class JobBench(Bench):
    """``prompt_len`` and ``gen_len`` are the longest ones of ``job``."""

    job: DrawnJob

    @property
    def prompts(self) -> Path:
        """A batch file of OpenAI's API."""
        return self.folder / "job.jsonl"

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return self.job.num_tokens

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in all layers."""
        elements = sum(2 * n * kind.attention.kv_size for kind, n in self.model.kinds_and_counts)
        return elements * self.model.dtype_bytes

    def make_inputs(self) -> None:
        """Write the model with a tokenizer, unless it is there already, and the job."""
        self.make_model()
        if not (self.checkpoint / "tokenizer.json").exists():
            write_tokenizer(self.checkpoint, self.model.vocab_size)
        self.job.write(self.prompts)
