"""The prompts of a job as the requests of a run over lanes."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.plan.lengths import Lengths
from executor.run.lanes import LaneRequest


class LaneRequests(Sequence[LaneRequest]):
    """The requests of a job, each made when it is asked for: a job may have many.

    Parameters
    ----------
    prompts
        The ids of each prompt.
    lengths
        Of each prompt, in the same order.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], lengths: Lengths) -> None:
        assert len(prompts) == len(lengths)
        self._prompts, self._lengths = prompts, lengths

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> LaneRequest:  # type: ignore[override]
        return LaneRequest(
            prompt_ids=self._prompts[index],
            max_tokens=int(self._lengths.limits[index]),
            expected_tokens=int(self._lengths.outputs[index]),
        )
