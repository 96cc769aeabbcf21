"""The progress of a job on several nodes: one bar of tokens for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from costmodel.plan.lengths import Lengths
from executor.cli.progress_bar import ProgressBar
from executor.run.finished import Finished


class ClusterBar(ProgressBar):
    """Counts the expected tokens of answers; one that ends early counts as long as expected.

    Parameters
    ----------
    lengths
        Of all requests.
    num_nodes
        Nodes at the start.
    """

    def __init__(self, lengths: Lengths, num_nodes: int) -> None:
        super().__init__()
        self._lengths, self._num_nodes = lengths, num_nodes
        self._num_ended = self._tokens = 0

    def begin(self) -> None:
        """Open the bar."""
        self._begin_run(float(self._lengths.outputs.sum()))

    def ended(self, finished: Sequence[Finished]) -> None:
        """Count requests that have ended."""
        assert self._bar is not None
        self._num_ended += len(finished)
        self._tokens += sum(done.num_generated for done in finished)
        rate = self._tokens / (time.perf_counter() - self._start_s)
        told = f"{self._num_nodes} nodes {self._num_ended}/{len(self._lengths)} prompts"
        self._bar.set_description_str(told, refresh=False)
        self._bar.set_postfix_str(f"{rate:.1f} token/s", refresh=False)
        self._bar.update(sum(int(self._lengths.outputs[done.request]) for done in finished))
