"""What a run of a job did: a few figures, and lengths for later runs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from costmodel.model.spec import ModelSpec
from executor.length_history import record_outputs
from executor.run.finished import Finished
from profiles.units import format_count, format_figure


@dataclass(slots=True, kw_only=True)
class JobSummary:
    """Figures of one run; those of an earlier run of the same job are not in it.

    Parameters
    ----------
    answered, failed
        Lines with an answer, and lines that could not be run.
    prompt_tokens, output_tokens
        Tokens of the prompts that were computed, and generated tokens with end tokens.
    energy_j
        Joules by part of the machine, where it tells.
    """

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    energy_j: Mapping[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """Return one line."""
        parts = [
            f"{format_count(self.answered, 'line')} answered, {self.failed} failed",
            f"{self.prompt_tokens} tokens in, {self.output_tokens} out",
        ]
        if self.energy_j:
            told = ", ".join(f"{name} {format_figure(j)} J" for name, j in self.energy_j.items())
            each = sum(self.energy_j.values()) / max(1, self.output_tokens)
            parts.append(f"energy {told}, {format_figure(each)} J a token")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return every figure under its name."""
        return {
            "answered": self.answered,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "energy_j": dict(self.energy_j),
        }


class KeptLengths:
    """The lengths of answers, from which later runs tell how long theirs will be."""

    def __init__(self) -> None:
        self._prompts, self._outputs, self._is_cut = array("I"), array("I"), array("b")

    def add(self, prompt_len: int, done: Finished) -> None:
        """Take the answer to a prompt of so many tokens."""
        self._prompts.append(prompt_len)
        self._outputs.append(done.num_generated)
        self._is_cut.append(done.reason == "length")

    def keep(self, model: ModelSpec) -> None:
        """Keep them with this machine's profile; only warns where that is not possible."""
        if self._prompts:
            record_outputs(model, self._prompts, self._outputs, self._is_cut)
