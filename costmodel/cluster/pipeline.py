"""Seconds of a pipeline whose stages work on a block each.

A round answers as many blocks as there are stages. In prefill, the blocks follow each other
through the stages. In decode, each block goes around: the last stage chooses its tokens, and the
first stage takes them for the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What limits a round where no stage and no link does: few blocks do not fill the pipeline.
ONE_BLOCK = "one block through all stages"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Seconds of one pass of one stage, or of one link, over a block.

    Parameters
    ----------
    prefill
        The pass over the prompts.
    decode
        A pass of each segment of decode; the context grows from segment to segment.
    """

    prefill: float
    decode: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The seconds of a round.

    Parameters
    ----------
    prefill_s
        From its start until the last block has passed the last stage.
    decode_s
        All that follows.
    slowest
        The place of the stage or link that most of the round waits for, among stages first and
        links second; ``None`` where it is one block's way through all of them.
    in_prefill
        Whether that is so in prefill, or else in decode.
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
    stages: Sequence[StageSeconds], links: Sequence[StageSeconds], passes: Sequence[float]
) -> Round:
    """Return the seconds of a round.

    Prefill is a flow shop of equal jobs: the first block's way, and then the slowest stage or link
    once for each block that follows. A pass of decode over all blocks takes as long as the slowest
    stage or link needs for all of them, and at least one block's way.

    Parameters
    ----------
    links
        Between the stages, and last from the last stage to the first. Each is busy with one
        block's message at a time. Tokens of prefill return while other blocks are computed.
    passes
        Passes of each segment of decode.
    """
    num_blocks = len(stages)
    servers = [*stages, *links]
    prefill = [server.prefill for server in servers]
    way_s, slowest_s = sum(prefill), max(prefill)
    prefill_s = way_s + (num_blocks - 1) * slowest_s
    # Seconds that each stage or link is waited for, by its place; None for one block's way.
    waited: dict[int | None, float] = {}
    for segment, count in enumerate(passes):
        seconds = [server.decode[segment] for server in servers]
        all_s, way_s = num_blocks * max(seconds), sum(seconds)
        place = seconds.index(max(seconds)) if all_s >= way_s else None
        waited[place] = waited.get(place, 0.0) + count * max(all_s, way_s)
    decode_s = sum(waited.values())
    in_prefill = prefill_s >= decode_s
    slowest = prefill.index(slowest_s) if in_prefill else max(waited, key=lambda p: waited[p])
    return Round(prefill_s=prefill_s, decode_s=decode_s, slowest=slowest, in_prefill=in_prefill)
