"""The cost model's seconds of each kind of task, divided among the tasks of a block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from costmodel.model.layout import decoder_numbers, token_elements
from costmodel.plan.plan import Plan
from costmodel.pricing.latency import TaskWork, hidden_visits, stage_work
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import shares_of
from costmodel.pricing.stages import (
    Stage,
    read_cache_bytes,
    stages_of,
    stored_cache_bytes,
)
from costmodel.schedule.lookahead import num_load_pieces
from costmodel.schedule.tasks import Task

# Kinds of work that one ``compute`` task does where the layer is not split.
WORK_OF_COMPUTE = ("project", "finish")


class TaskSeconds:
    """The seconds of every task: its share of the seconds of its kind and stage."""

    def __init__(self, plan: Plan, problem: Problem) -> None:
        policy = plan.policy
        self._problem = problem
        self._num_batches = policy.num_gpu_batches
        self._num_pieces = num_load_pieces(plan, policy.num_gpu_batches)
        # By phase, because decode moves other experts than prefill.
        self._moved_bytes = {
            is_prefill: _moved_bytes(plan, is_prefill=is_prefill) for is_prefill in (True, False)
        }
        # The share of each layer in the arithmetic and in the cache of all layers.
        specs = [problem.model.layer(number) for number in decoder_numbers(problem.model)[1:]]
        layers = problem.sizes.layers[1 : len(specs) + 1]
        kept = [problem.layer_kinds[problem.model.layer_kinds.index(spec)] for spec in specs]
        used = [token_elements(c, s.experts) for c, s in zip(layers, specs, strict=True)]
        routed = [layer.kind == "experts" for layer in layers]
        self._computed = [0.0, *_shares([u * (not r) for u, r in zip(used, routed, strict=True)])]
        self._routed = [0.0, *_shares([u * r for u, r in zip(used, routed, strict=True)])]
        self._in_place = _shares([sum(c.bytes_in_place for c in layer) for layer in plan.weights])
        tokens = [k.cache.token_bytes * (not r) for k, r in zip(kept, routed, strict=True)]
        self._kept = [0.0, *_shares(tokens)]
        # The cache of each layer but the embedding.
        self._caches = [kind.cache for kind in kept]
        self._plan = plan
        self._walked = plan.route.demanding if plan.walks_experts else frozenset[int]()
        self._num_groups = -(-policy.num_gpu_batches // plan.batches_at_once)
        self._stages = stages_of(problem)
        self._stage_of_pass = [
            i for i, stage in enumerate(self._stages) for _ in range(int(stage.passes))
        ]
        shares = shares_of(policy)
        self._kinds = [
            _by_kind(stage_work(problem, shares, stage), policy.block_size)
            for stage in self._stages
        ]

    def of(self, task: Task) -> float:
        """Return the seconds of one task that shares no resource with another channel."""
        stage_index = self._stage_of_pass[task.token]
        stage, kinds = self._stages[stage_index], self._kinds[stage_index]
        layer = self._problem.sizes.layers[task.layer].kind
        per_pass = stage.passes * self._num_batches
        if task.kind in ("route", "combine"):
            return self._overhead_s(stage)
        if task.layer in self._walked and task.kind in ("read_experts", "run_chunk", "compute"):
            return self._of_chunk(task, stage, kinds)
        if task.kind in ("return_tokens", "run_experts", "send_made"):
            visits = stage.passes * self._num_groups
            dealt = self._in_place if task.kind == "run_experts" else self._routed
            return kinds[task.kind] / visits * dealt[task.layer]
        if task.kind in self._moved_bytes[stage.is_prefill]:
            moved = self._moved_bytes[stage.is_prefill][task.kind]
            pieces = stage.passes * self._num_pieces
            return kinds[task.kind] * moved[task.layer] / max(1, sum(moved)) / pieces
        if task.kind == "compute" and layer == "head":
            groups = -(-self._num_batches // self._plan.head_batches_at_once)
            return kinds["head"] / stage.passes / groups / self._problem.sizes.num_head_chunks
        if task.kind == "compute" and layer == "embed":
            return self._overhead_s(stage)
        if task.kind in ("read_hidden", "send_hidden", "return_hidden", "write_hidden"):
            loads, stores = hidden_visits(self._problem, stage)
            visits = loads if task.kind in ("read_hidden", "send_hidden") else stores
            return kinds[task.kind] / per_pass / visits
        if task.kind == "compute" and layer == "experts":
            visits = stage.passes * (
                self._num_groups if not stage.is_prefill else self._num_batches
            )
            return kinds["experts"] / visits * self._routed[task.layer]
        if task.kind == "compute":
            total = sum(kinds[kind] for kind in WORK_OF_COMPUTE)
            return total / per_pass * self._computed[task.layer]
        if task.kind in WORK_OF_COMPUTE:
            return kinds[task.kind] / per_pass * self._computed[task.layer]
        return kinds[task.kind] * self._cache_share(task, stage) / self._num_batches

    def _of_chunk(self, task: Task, stage: Stage, kinds: Mapping[str, float]) -> float:
        """Return the seconds in which a chunk of experts is read or computed."""
        if task.kind == "compute":
            # What is left behind the last chunk takes little time.
            return 0.0
        is_prefill = stage.is_prefill
        policy = self._plan.policy
        tokens = policy.gpu_batch_size * (policy.workload.prompt_len if is_prefill else 1)
        chunks = self._plan.chunks(task.layer, self._num_batches, tokens).count
        share, seconds = self._routed[task.layer], kinds["experts"] + kinds["chunks"]
        if task.kind == "read_experts":
            moved = self._moved_bytes[stage.is_prefill][task.kind]
            seconds, share = kinds[task.kind], moved[task.layer] / sum(moved)
        return seconds / stage.passes / self._num_groups * share / chunks

    def _overhead_s(self, stage: Stage) -> float:
        parts = self._problem.gpu_batch_size / stage.sequences_at_once
        return self._problem.hardware.compute.task_overhead_s * parts

    def _cache_share(self, task: Task, stage: Stage) -> float:
        """Return the share of a layer and pass in the stage's seconds of a kind of task: reads grow
        with the context, up to the layer's window."""
        cache = self._caches[task.layer - 1]
        if task.kind in ("read_cache", "send_cache", "attend"):
            context = cache.num_slots(self._problem.workload.prompt_len + task.token - 1)
            return cache.token_bytes * context / read_cache_bytes(self._problem, stage)
        if task.kind in ("return_cache", "write_cache"):
            stored = cache.token_bytes * stage.slots_stored(cache)
            stored_passes = 1 if stage.is_prefill else stage.stored_tokens
            total = stored_cache_bytes(self._problem, stage)
            return stored / max(1, total * stored_passes)
        return self._kept[task.layer] / stage.passes


def _moved_bytes(plan: Plan, *, is_prefill: bool) -> dict[str, list[int]]:
    """Return the bytes of each layer that each kind of weight task moves.

    In decode, experts may be loaded on demand, and those that the CPU multiplies are not sent.
    """
    kinds = ("read_weights", "send_weights", "read_experts", "send_experts")
    moved = {kind: [0] * len(plan.layers) for kind in kinds}
    # The embedding is gathered, never staged.
    for component in itertools.chain(*plan.weights[1:]):
        layer, is_experts = component.layer, component.layout.is_experts
        is_late = plan.policy.loads_on_demand and (plan.walks_experts or not is_prefill)
        what = "experts" if is_experts and is_late else "weights"
        in_place = 0 if is_prefill else component.bytes_in_place
        moved[f"read_{what}"][layer] += component.cut.disk_bytes
        moved[f"send_{what}"][layer] += component.cut.off_gpu_bytes - in_place
    return moved


def _shares(amounts: Sequence[int]) -> list[float]:
    """Return each amount as a fraction of their sum."""
    whole = sum(amounts) or 1
    return [amount / whole for amount in amounts]


def _by_kind(work: Sequence[TaskWork[float]], block_size: int) -> dict[str, float]:
    return {piece.kind: float(piece.seconds) * block_size for piece in work}
