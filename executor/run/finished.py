"""What a run tells of each request when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

from executor.model.token_scores import TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A request that has ended.

    Parameters
    ----------
    request
        Its index among the prompts of the run.
    ids
        The generated tokens, without the end token.
    reason
        ``stop`` at an end token or a stop string, ``length`` at the limit.
    stop
        The end token or the stop string that it ended at; ``None`` at the limit.
    scores
        Those of ``ids``, where they were asked for.
    """

    request: int
    ids: tuple[int, ...]
    reason: str
    stop: str | int | None = None
    scores: TokenScores | None = None

    @property
    def num_generated(self) -> int:
        """Tokens that were generated, the end token included."""
        return len(self.ids) + isinstance(self.stop, int)
