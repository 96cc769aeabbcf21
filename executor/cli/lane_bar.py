"""The progress of a run over lanes: prompts that are done, tokens, and the time left by tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from costmodel.plan.cuts import policy_layers
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.schedule.job_simulation import simulate_job
from costmodel.schedule.tasks import Task
from executor.cli.progress_bar import ProgressBar
from profiles.hardware import HardwareProfile


class LaneBar(ProgressBar):
    """The bar of a run over lanes.

    It is where the predicted run has as many tokens. An answer that ends early counts as long as
    it was expected to be: nobody waits for its other tokens.

    Parameters
    ----------
    policy, hardware
        What runs.
    lengths
        Of all prompts.
    is_shown
        As of ``ProgressBar``.
    """

    def __init__(
        self,
        policy: Policy,
        hardware: HardwareProfile,
        lengths: Lengths,
        *,
        is_shown: bool = True,
    ) -> None:
        super().__init__(is_shown=is_shown)
        self._policy, self._hardware, self._lengths = policy, hardware, lengths
        self._num_visits = (
            len(policy_layers(policy, has_gpu=hardware.has_gpu)) * policy.num_gpu_batches
        )
        # Tokens and seconds at the end of each predicted pass.
        self._reached: tuple[np.ndarray, np.ndarray] | None = None
        self._made = self._counted = self._ended_tokens = 0
        self._num_ended = self._visits = 0
        # Predicted seconds at the beginning and at the end of this pass, and now.
        self._begin_s = self._end_s = self._now_s = 0.0

    def loading(self, num_bytes: int) -> None:
        """Open the bar of the weights, and predict the run if anybody is to see it."""
        super().loading(num_bytes)
        assert self._bar is not None
        if not self._bar.disable:
            timeline = simulate_job(self._policy, self._hardware, self._lengths)
            tokens = timeline.counts.decoding + timeline.counts.newcomers
            self._reached = (
                np.concatenate([[0.0], tokens.cumsum()]),
                np.concatenate([[0.0], timeline.seconds.cumsum()]),
            )

    def begin_pass(self, num_tokens: int) -> None:
        """Open the bar of the run at its first pass."""
        if self._reached is None:
            return
        with self._lock:
            if self._made == 0:
                self._begin_run(float(self._reached[1][-1]))
            self._visits = 0
            self._begin_s = self._seconds_at(self._done)
            self._end_s = max(self._begin_s, self._seconds_at(self._done + num_tokens))

    def computed(self, task: Task) -> None:
        """Advance the bar of the run by one layer of one batch."""
        with self._lock:
            if self._reached is not None:
                self._visits += 1
                share = min(1.0, self._visits / self._num_visits)
                self._show(self._begin_s + share * (self._end_s - self._begin_s))

    def end_pass(self, num_tokens: int, ended: Mapping[int, int]) -> None:
        """Count the tokens of a pass, and the requests that ended in it."""
        if self._reached is None:
            return
        with self._lock:
            self._made += num_tokens
            self._num_ended += len(ended)
            for request, generated in ended.items():
                self._counted += int(self._lengths.outputs[request])
                self._ended_tokens += generated
            self._show(self._seconds_at(self._done))

    @property
    def _done(self) -> int:
        """Tokens that need no more work: what was expected of answers that have ended, and what
        the others have. Each of these has at least one more to come."""
        most = int(self._lengths.outputs.sum()) - (len(self._lengths) - self._num_ended)
        return min(most, self._counted + self._made - self._ended_tokens)

    def _seconds_at(self, tokens: int) -> float:
        assert self._reached is not None
        return float(np.interp(tokens, *self._reached))

    def _show(self, now_s: float) -> None:
        # More prompts than in the prediction may begin in a pass; the bar goes back for nothing.
        step, self._now_s = max(0.0, now_s - self._now_s), max(self._now_s, now_s)
        done = f"{self._num_ended}/{len(self._lengths)} prompts"
        self._advance(step, done, self._made, f"{self._made} tokens, ")
