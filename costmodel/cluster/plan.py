"""What each node of a cluster runs, its prediction, and the JSON file of both."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from costmodel.cluster.nodes import Links
from costmodel.cluster.stages import stage_of
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from profiles.errors import InputError
from profiles.files import dump_json, from_json, read_json, to_json
from profiles.outputs import write_output

SCHEMA_VERSION = 1
# Shares of prompts are rounded in files that people edit.
SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one node runs.

    Parameters
    ----------
    node
        The node's name.
    policy
        The node's policy. Its model is the stage (see ``ModelSpec.stage``), or the whole model.
    """

    node: str
    policy: Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPrediction:
    """The cost model's prediction for one copy of the model.

    Parameters
    ----------
    throughput_tok_per_s
        Generated tokens a second, prompts included.
    prefill_s, decode_s
        Of a copy of several stages, seconds from the start of a round until the last block has left
        prefill, and the seconds after that. A round answers each block in flight. Of a copy of one
        stage, those of a block. Lanes have one phase of a whole job, which counts as decode.
    limit
        What most of the time is waited for: a limit of a stage's node, a link, or the path of one
        block through all stages.
    """

    throughput_tok_per_s: float
    prefill_s: float
    decode_s: float
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """One copy of the model: a node, or the nodes of a pipeline in the order of their layers.

    Parameters
    ----------
    stages
        All of them take blocks of the same number of sequences. With lanes, all have the same
        cache and rows, with room for every block in flight.
    share
        Fraction of the prompts that this copy is expected to answer. Prompts are handed out as
        copies become free, so that it is no promise.
    """

    stages: tuple[StagePlan, ...]
    share: float
    predicted: CopyPrediction | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.share) or not 0 <= self.share <= 1:
            raise InputError("copy.share", got=self.share, allowed="a fraction in [0, 1]")
        if not self.stages:
            raise InputError("copy.stages", got="none", allowed="one stage or more")
        end = 0
        for place, plan in enumerate(self.stages):
            stage = stage_of(plan.policy.model)
            if stage.first != end:
                raise InputError(
                    f"copy.stages[{place}]",
                    got=f"layers from {stage.first}",
                    allowed=f"layers from {end}, behind those of the stage before",
                )
            end = stage.end
            self._check_policy(place, plan.policy)
        if end != stage.num_layers:
            raise InputError(
                "copy.stages", got=f"{end} layers", allowed=f"all {stage.num_layers} layers"
            )

    def _check_policy(self, place: int, policy: Policy) -> None:
        """Refuse a stage that does not fit those before it."""
        wanted = _shared(self.stages[0].policy) | {"blocks_in_flight": self.blocks_in_flight}
        found = _shared(policy)
        for name, value in wanted.items():
            if found[name] != value:
                what = f"copy.stages[{place}].policy"
                raise InputError(what, got=f"{name} {found[name]}", allowed=f"{name} {value}")

    @property
    def block_size(self) -> int:
        """Sequences that pass through the stages together."""
        return self.stages[0].policy.block_size

    @property
    def blocks_in_flight(self) -> int:
        """Blocks that the stages work on at the same time: as many as there are stages."""
        return len(self.stages)


def _shared(policy: Policy) -> dict[str, int | None]:
    """Return what all stages of a copy have alike."""
    lanes = policy.lanes
    return {
        "block size": policy.block_size,
        "blocks_in_flight": policy.blocks_in_flight,
        "lanes.pool_tokens": lanes.pool_tokens if lanes else None,
        "lanes.pass_rows": lanes.pass_rows if lanes else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class OneMore:
    """What another node would bring.

    Parameters
    ----------
    like
        The name of the node that the other one is a twin of.
    throughput_tok_per_s
        Of the best plan with both.
    """

    like: str
    throughput_tok_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPrediction:
    """The cost model's prediction for a cluster.

    Parameters
    ----------
    throughput_tok_per_s
        Generated tokens a second of all copies together, prompts included.
    limit
        The limit of the copy with the largest share of the prompts.
    one_more
        For each kind of node, what another one would bring; empty where nobody asked.
    """

    throughput_tok_per_s: float
    limit: str
    one_more: tuple[OneMore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What a cluster runs: copies of a model, each on a node or on the nodes of a pipeline.

    Parameters
    ----------
    model
        The whole model.
    workload
        All prompts of the job.
    copies
        No node is in two of them. A node in none has nothing to do.
    links
        The network that the plan was made for; ``None`` where nobody has told.
    """

    model: ModelSpec
    workload: Workload
    copies: tuple[CopyPlan, ...]
    predicted: ClusterPrediction | None = None
    links: Links | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InputError(
                "cluster plan schema_version",
                got=self.schema_version,
                allowed=f"{SCHEMA_VERSION}; another version of this program wrote it",
            )
        if not self.copies:
            raise InputError("cluster plan copies", got="none", allowed="one copy or more")
        counts = Counter(plan.node for copy in self.copies for plan in copy.stages)
        if twice := [node for node, count in counts.items() if count > 1]:
            raise InputError(
                "cluster plan copies", got=f"{twice[0]} twice", allowed="each node once"
            )
        total = sum(copy.share for copy in self.copies)
        if abs(total - 1) > SHARE_TOLERANCE:
            raise InputError(
                "cluster plan copies",
                got=f"shares that sum to {total:.6g}",
                allowed="shares that sum to 1",
            )
        for copy in self.copies:
            num_layers = stage_of(copy.stages[0].policy.model).num_layers
            if num_layers != self.model.num_layers:
                raise InputError(
                    "cluster plan copies",
                    got=f"a copy of {num_layers} layers",
                    allowed=f"{self.model.num_layers} layers, as in {self.model.name}",
                )

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that have something to do."""
        return tuple(plan.node for copy in self.copies for plan in copy.stages)

    def save(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_output(path, partial(dump_json, to_json(self)))

    @classmethod
    def load(cls, path: Path) -> ClusterPlan:
        """Read a plan; raises ``InputError`` with file and key for an invalid one."""
        raw = read_json(path, "cluster plan")
        if "copies" not in raw:
            raise InputError(
                f"cluster plan {path}",
                got="no key 'copies'",
                allowed="a plan from zigzag cluster search",
            )
        return from_json(cls, raw, f"cluster plan {path}")
