"""What all searches for a cluster share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.optimizer.optimum import DEFAULT_MARGIN
from costmodel.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterQuestion:
    """The input of a search for a cluster, but for its nodes.

    Parameters
    ----------
    permitted
        Approximations that change outputs.
    margin
        Share of every capacity that is left free.
    only_runnable
        Whether stages are those that the executor runs: over lanes, on CPUs, with cache and hidden
        states in memory. Otherwise they run in step, as FlexGen's do, on any machine and with any
        placement. Nothing here runs such a plan.
    only_copies
        Whether no layers may be cut over nodes.
    on_searched
        Called after each search for a policy.
    """

    model: ModelSpec
    workload: Workload
    permitted: Permitted = DEFAULT_PERMITTED
    margin: float = DEFAULT_MARGIN
    only_runnable: bool = True
    only_copies: bool = False
    on_searched: Callable[[], object] = lambda: None
