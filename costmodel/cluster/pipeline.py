"""Seconds of a pipeline whose stages work on a block each.

As many blocks are in flight as there are stages. In the first pass, they follow each other through
the stages. Then each block goes around: the last stage chooses its tokens, and the first stage
takes them for the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.pricing.passes import FloatArray

# What limits a round where no stage and no link does: few blocks do not fill the pipeline.
ONE_BLOCK = "one block through all stages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The seconds of a round: all passes of all blocks in flight.

    Parameters
    ----------
    prefill_s
        From its start until the last block has left its first pass.
    decode_s
        All that follows.
    slowest
        The place of the stage or link that most of the round waits for, among stages first and
        links second; ``None`` where it is one block's way through all of them.
    in_prefill
        Whether that is so in the first pass, or else in those that follow.
    """

    prefill_s: float
    decode_s: float
    slowest: int | None
    in_prefill: bool

    @property
    def seconds(self) -> float:
        """Seconds of the whole round."""
        return self.prefill_s + self.decode_s


def price_round(
    stages: Sequence[FloatArray], links: Sequence[FloatArray], counts: FloatArray
) -> Round:
    """Return the seconds of a round.

    A pass over all blocks takes as long as the slowest stage or link needs for all of them, and at
    least one block's way. In the first pass, the pipeline also fills: it is a flow shop of equal
    jobs, which takes the first block's way, and the slowest stage or link once for each block that
    follows.

    Parameters
    ----------
    stages
        Seconds of each pass of a block in each stage, float64 [passes].
    links
        The same of the links between the stages, and last of the one from the last stage to the
        first. Each is busy with one block's message at a time.
    counts
        How often each pass is made, float64 [passes].
    """
    num_blocks = len(stages)
    servers = np.stack([*stages, *links])
    way_s, slowest_s = servers.sum(axis=0), servers.max(axis=0)
    pass_s = np.maximum(num_blocks * slowest_s, way_s) * counts
    fill_s = way_s[0] + (num_blocks - 1) * slowest_s[0] - max(num_blocks * slowest_s[0], way_s[0])
    prefill_s = float(pass_s[0] + fill_s)
    decode_s = float(pass_s[1:].sum())
    # Where no server is busy for the whole of a pass, none is waited for.
    place = np.where(num_blocks * slowest_s >= way_s, servers.argmax(axis=0), len(servers))
    waited = np.zeros(len(servers) + 1)
    np.add.at(waited, place[1:], pass_s[1:])
    in_prefill = prefill_s >= decode_s
    slowest = int(servers[:, 0].argmax() if in_prefill else waited.argmax())
    return Round(
        prefill_s=prefill_s,
        decode_s=decode_s,
        slowest=slowest if slowest < len(servers) else None,
        in_prefill=in_prefill,
    )
