"""The progress of a run on a terminal: the weights, then blocks, token/s and the time left."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Never

from costmodel.plan.plan import Plan
from costmodel.plan.policy import Policy, Prediction
from costmodel.schedule.tasks import Task
from executor.run.results import Progress

with warnings.catch_warnings():
    # In a notebook without ipywidgets it warns, and shows the bar of a terminal.
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"


class ProgressBar(Progress):
    """One bar for the weights, one for the run. A context manager.

    The run's bar counts predicted seconds, so that the time left is right although a layer takes
    much longer for prompts than in decode; tqdm scales them by what the run really takes.

    Parameters
    ----------
    is_shown
        Whether the bars are shown where there is a terminal or a notebook.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        # A notebook's stream is no terminal. tqdm takes None to ask the stream.
        is_terminal_needed = None if "ipykernel.zmqshell" not in sys.modules else False
        self._is_disabled = is_terminal_needed if is_shown else True
        self._lock = threading.Lock()
        self._bar: tqdm[Never] | None = None
        self._start_s = 0.0

    def loading(self, num_bytes: int) -> None:
        """Open the bar of the weights."""
        self._bar = tqdm(
            total=num_bytes,
            desc="loading weights",
            unit="B",
            unit_scale=True,
            disable=self._is_disabled,
        )

    def loaded(self, num_bytes: int) -> None:
        """Advance the bar of the weights."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def close(self) -> None:
        """Close whichever bar is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_run(self, seconds: float) -> None:
        """Open the bar of a run that is predicted to take so long."""
        self.close()
        self._start_s = time.perf_counter()
        self._bar = tqdm(
            # Rounding must not carry the parts beyond the whole, of which tqdm warns.
            total=seconds * (1 + 1e-9),
            bar_format=BAR_FORMAT,
            disable=self._is_disabled,
        )

    def _advance(self, seconds: float, phase: str, tokens: float, told: str = "") -> None:
        """Go on by predicted seconds of a phase; ``tokens`` are all that were made so far."""
        assert self._bar is not None
        rate = tokens / (time.perf_counter() - self._start_s)
        self._bar.set_description_str(phase, refresh=False)
        self._bar.set_postfix_str(f"{told}{rate:.1f} token/s", refresh=False)
        self._bar.update(seconds)


class BlockBar(ProgressBar):
    """The bar of a run whose sequences are in step.

    Parameters
    ----------
    predictions
        One for each block, in the order in which they run.
    policy
        The policy that runs.
    num_prompts
        Sequences in all blocks together.
    has_gpu
        Whether the machine has one, which decides how the head is cut.
    is_shown
        As of ``ProgressBar``.
    """

    def __init__(
        self,
        predictions: Sequence[Prediction],
        policy: Policy,
        *,
        num_prompts: int,
        has_gpu: bool,
        is_shown: bool = True,
    ) -> None:
        super().__init__(is_shown=is_shown)
        self._predictions = predictions
        self._block_size = policy.block_size
        self._num_prompts = num_prompts
        self._gen_len = policy.workload.gen_len
        self._plan = Plan.of(policy, has_gpu=has_gpu)
        self._block = -1
        self._num_batches = 1
        self._tokens = 0.0

    def started(self, num_batches: int) -> None:
        """Open the bar of the run at its first block."""
        with self._lock:
            self._block += 1
            self._num_batches = num_batches
            if self._block == 0:
                self._begin_run(sum(prediction.latency_s for prediction in self._predictions))

    def computed(self, task: Task) -> None:
        """Advance the bar of the run by one layer of the batches that pass through it together."""
        with self._lock:
            if self._bar is None or self._block < 0:
                return
            prediction = self._predictions[self._block]
            visits = len(self._plan.layers) * self._num_batches
            together = self._plan.batches_together(task.layer, is_prefill=task.is_prefill)
            together = min(together, self._num_batches - task.batch)
            if task.is_prefill:
                seconds = prediction.prefill_s / visits * together
            else:
                seconds = prediction.decode_s / (visits * (self._gen_len - 1)) * together
            sequences = min(self._block_size, self._num_prompts - self._block * self._block_size)
            self._tokens += sequences / visits * together
            phase = "prefill" if task.is_prefill else f"decode {task.token + 1}/{self._gen_len}"
            block = f"block {self._block + 1}/{len(self._predictions)}"
            self._advance(seconds, f"{block} {phase}", self._tokens)
