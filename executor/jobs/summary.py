"""What a run of a job did, in a few figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
