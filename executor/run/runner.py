"""Runs a policy over prompts, block by block."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from costmodel.plan.plan import Plan
from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes
from costmodel.pricing.memory import phases_of
from costmodel.pricing.price import check_executable, check_machine, policy_peaks
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import ZigzagSchedule
from executor.checkpoint.folder import WeightSource
from executor.engine.channels import Ending, Engine
from executor.engine.trace import Span, Trace
from executor.machine.allocator import keep_freed_memory
from executor.machine.memory_budget import check_available
from executor.machine.memory_watch import MemoryWatch, out_of_memory_told
from executor.machine.offload_folder import bytes_in_memory, check_offload_folder, remove_orphans
from executor.machine.tiers import Machine
from executor.model.sampling import Chooser, Sampler
from executor.run.batch import Batch
from executor.run.block import Block, Stores
from executor.run.expert_cache import ExpertCache
from executor.run.expert_order import FloatArray, bytes_of_order, order_of, shares_to_order
from executor.run.lane_block import LaneBlock, LaneStores
from executor.run.lane_run import HandOuts, LaneRun, check_lanes
from executor.run.lanes import LaneRequest
from executor.run.pass_log import PassLog
from executor.run.results import BlockResult, Progress, collect
from executor.run.same_model import check_same_model
from executor.run.stage_run import StageRun
from executor.run.token_embedding import TokenEmbedding
from executor.run.warm_up import compile_kernels
from executor.stores.activations import HiddenStates
from executor.stores.kv_cache import KVCache
from executor.stores.packed_source import PackedSource
from executor.stores.paged_cache import PagedCache
from executor.stores.pass_rows import PassRows
from executor.stores.scratch_file import ScratchFile
from executor.stores.weight_file import WeightFile
from executor.stores.weights import WeightStore
from profiles import kernels
from profiles.errors import InputError
from profiles.hardware import HardwareProfile

Kind = TypeVar("Kind", bound=LaneRun)

# Tasks that are made in advance while the previous token is computed.
TASKS_AHEAD = 256


class Runner:
    """Runs one policy; allocates all of its memory once. A context manager.

    Parameters
    ----------
    policy
        The placements, which the run keeps to the byte.
    hardware
        The machine with its budgets, which the policy must fit.
    source
        The weights.
    offload_dir
        Where weights, cache and hidden states on disk go.
    sampler, eos_ids
        The choice of tokens, and the tokens that end a sequence.
    on_span
        Called with each ended task, by the worker of its channel.
    expert_shares
        For each layer with experts, the share of all tokens that chose each of them before. The
        most used ones stay in memory where experts are loaded on demand; ``None`` begins with all
        alike. No token depends on it.
    """

    def __init__(
        self,
        policy: Policy,
        hardware: HardwareProfile,
        source: WeightSource,
        offload_dir: Path,
        *,
        sampler: Chooser | None = None,
        eos_ids: frozenset[int] = frozenset(),
        progress: Progress | None = None,
        on_span: Callable[[Span], None] | None = None,
        expert_shares: Sequence[FloatArray] | None = None,
    ) -> None:
        check_runnable(policy, hardware, source)
        self.policy = policy
        self.hardware = hardware
        packs = policy.weight_bits < policy.model.full_bits
        self.source = PackedSource(source=source) if packs else source
        self.offload_dir = offload_dir
        self.sampler: Chooser = sampler or Sampler()
        self.eos_ids = eos_ids
        self.progress = progress or Progress()
        self._expert_shares = shares_to_order(policy, hardware, expert_shares)
        order = order_of(self._expert_shares)
        self.plan = Plan.of(policy, has_gpu=hardware.has_gpu, expert_order=order)
        self.route = self.plan.route
        listeners = [self._tell, on_span] if on_span else [self._tell]
        self.trace = Trace(listeners, phases=phases_of(policy))
        # Of the latest passes over lanes.
        self.passes = PassLog()
        self._stack = ExitStack()
        self._disk_bytes = 0

    def __enter__(self) -> Runner:
        try:
            with out_of_memory_told(self.hardware):
                self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._stack.close()
        # The trace outlives the run and refers to the runner, so the memory is released here.
        for name in ("weights", "block", "engine"):
            self.__dict__.pop(name, None)

    def run(self, prompts: Sequence[Sequence[int]]) -> Iterator[BlockResult]:
        """Generate for every prompt, given as token ids; yields each block as it ends.

        Prompts of similar length share a block, so that there is little padding. The longest come
        first, so that the peak of memory is at the start. A policy with lanes has no blocks: the
        sequences that end in the same pass come together.
        """
        if isinstance(self.block, LaneBlock):
            gen_len = self.policy.workload.gen_len
            yield from self.run_requests(
                [LaneRequest(prompt_ids=ids, max_tokens=gen_len) for ids in prompts]
            )
            return
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for first in range(0, len(order), self.policy.block_size):
            part = order[first : first + self.policy.block_size]
            with out_of_memory_told(self.hardware):
                result = self._run_block(self.block, prompts, part)
            yield result

    def run_requests(
        self, requests: Sequence[LaneRequest], *, prefixes: Prefixes | None = None
    ) -> Iterator[BlockResult]:
        """Generate for requests with lengths and choices of their own; needs a policy with lanes.

        Yields the sequences that end in the same pass together, each by its place in ``requests``.
        None may be longer than the policy's workload says. ``prefixes`` is what prompts
        begin with in common, which is computed once; ``None`` finds it here.
        """
        lane_run = self._lane_run(LaneRun)
        with out_of_memory_told(self.hardware):
            yield from lane_run.run(requests, prefixes)

    def run_handed_out(self, hand_outs: HandOuts) -> Iterator[BlockResult]:
        """Generate for requests that come while the run goes on; needs a policy with lanes.

        Ends when no more will come. Yields as ``run_requests`` does.
        """
        lane_run = self._lane_run(LaneRun)
        with out_of_memory_told(self.hardware):
            yield from lane_run.run_handed_out(hand_outs)

    def stage_run(self) -> StageRun:
        """Return what runs the passes of a stage of a pipeline."""
        return self._lane_run(StageRun)

    def _lane_run(self, kind: type[Kind]) -> Kind:
        assert isinstance(self.block, LaneBlock)
        self.passes = PassLog()
        return kind(
            self.plan,
            self.block,
            self.engine,
            self.sampler,
            self.eos_ids,
            self.passes,
            self.progress,
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes of this run on disk: weights, cache and hidden states."""
        return self._disk_bytes

    def _tell(self, span: Span) -> None:
        if span.task.kind in ("compute", "finish"):
            self.progress.computed(span.task)
            self._watch.check()

    def _tell_loaded(self, num_bytes: int) -> None:
        self.progress.loaded(num_bytes)
        self._watch.check()

    def _open(self) -> None:
        keep_freed_memory()
        remove_orphans(self.offload_dir)
        policy, enter = self.policy, self._stack.enter_context
        file = None
        if any(part.cut.disk_bytes for layer in self.plan.weights for part in layer):
            file = enter(WeightFile(self.offload_dir, self.source, self.plan.layers))
        needed = policy_peaks(policy, self.hardware)["disk"]
        if self._expert_shares:
            needed += bytes_of_order(policy, self.hardware)
        file_bytes = bytes_in_memory(self.offload_dir, needed, file.path if file else None)
        check_available(policy, self.hardware, file_bytes=file_bytes)
        # A first build of the kernels takes memory, so it comes before the weights.
        kernels.load_library()
        self._watch = enter(MemoryWatch(self.hardware))
        machine = enter(Machine(self.hardware))
        self.weights = WeightStore(self.plan, machine, file)
        missing = file.missing_bytes(self.plan.weights) if file else 0
        if policy.lanes:
            # Sequences have other neighbours in every pass.
            enter(kernels.fixed_rows())
        make_block = self._lane_block if policy.lanes else self._block
        self.block, files = make_block(machine, TokenEmbedding(policy.model, self.weights, file))
        scratch_bytes = sum(store.disk_bytes() for store in files)
        self._disk_bytes = scratch_bytes + self.weights.disk_bytes
        if missing or scratch_bytes:
            check_offload_folder(self.offload_dir, missing + scratch_bytes)
        if scratch_bytes:
            scratch = enter(ScratchFile(self.offload_dir))
            for store in files:
                store.file = scratch
        self.progress.loading(missing + self.weights.resident_bytes)
        if file:
            file.build(self.plan.weights, self._tell_loaded)
        self.weights.load(self.source, self._tell_loaded)
        self.source.check_unchanged()
        if self.hardware.uses_cuda:
            device = machine.compute.device
            compile_kernels(policy, self.plan.layers, device)
        shares_cores = self.route.attends_on_cpu or bool(self.route.experts_in_place)
        channels = machine.make_channels(shares_cores=shares_cores)
        self.engine = enter(Engine(channels, self.block.handlers(), self.trace))

    def _block(
        self, machine: Machine, embedding: TokenEmbedding
    ) -> tuple[Block | LaneBlock, list[KVCache | HiddenStates | PagedCache]]:
        """Return the handlers of sequences in step, and the stores that have parts on disk."""
        cache = KVCache(self.plan, machine)
        hidden = HiddenStates(self.policy, machine, file_offset=cache.disk_bytes())
        stores = Stores(weights=self.weights, embedding=embedding, cache=cache, hidden=hidden)
        block = Block(self.policy, machine, stores, self.sampler, self.eos_ids)
        if self.plan.walks_experts and self._expert_shares:
            shares = dict(zip(block.routing_counts.layers, self._expert_shares, strict=True))
            block.walk.cache = ExpertCache(self.weights, shares)
        return block, [cache, hidden]

    def _lane_block(
        self, machine: Machine, embedding: TokenEmbedding
    ) -> tuple[Block | LaneBlock, list[KVCache | HiddenStates | PagedCache]]:
        """Return the handlers of lanes, and the store that may have parts on disk."""
        cache = PagedCache(self.policy, machine)
        stores = LaneStores(
            weights=self.weights,
            embedding=embedding,
            cache=cache,
            hidden=PassRows(self.policy, machine),
        )
        return LaneBlock(self.policy, machine, stores), [cache]

    def _run_block(
        self, block: Block, prompts: Sequence[Sequence[int]], indices: list[int]
    ) -> BlockResult:
        gen_len = self.policy.workload.gen_len
        prompt_len = max(len(prompts[i]) for i in indices)
        # Batches of equal size, so that the last one of a block is not a small one.
        num_batches = -(-len(indices) // self.policy.gpu_batch_size)
        size = -(-len(indices) // num_batches)
        parts = [indices[first : first + size] for first in range(0, len(indices), size)]
        batches = [
            Batch([prompts[i] for i in part], part, prompt_len=prompt_len, gen_len=gen_len)
            for part in parts
        ]
        block.start(batches)
        self.progress.started(len(batches))
        schedule = ZigzagSchedule(
            self.plan,
            num_batches=len(batches),
            num_tokens=gen_len,
            batch_size=size,
            prompt_len=prompt_len,
        )
        start_s = time.perf_counter()
        ends_s = self._run_schedule(block, schedule)
        return collect(batches, self.eos_ids, prompt_len, start_s, ends_s)

    def _run_schedule(self, block: Block, schedule: ZigzagSchedule) -> list[float]:
        """Submit the tasks token by token; returns the time at which each token was done."""
        # This thread computes nothing from here on; its OpenMP threads would slow the workers down.
        kernels.end_idle_threads()
        ends_s: list[float] = []
        last: Ending | None = None
        tasks = iter(schedule)
        ahead: deque[Task] = deque()
        while (task := ahead.popleft() if ahead else next(tasks, None)) is not None:
            if task.token > len(ends_s) and task.channel == self.route.compute_channel:
                # The next token's tasks wait for this token. Its first loads are submitted already,
                # and more tasks are made now, before the workers need the interpreter.
                assert last is not None
                ahead.extend(itertools.islice(tasks, TASKS_AHEAD - len(ahead)))
                self.engine.wait(last)
                ends_s.append(time.perf_counter())
                self.engine.forget_done()
                if block.is_finished:
                    break
            completion = self.engine.submit(task)
            if task.channel == self.route.compute_channel:
                last = completion
        else:
            assert last is not None
            self.engine.wait(last)
            ends_s.append(time.perf_counter())
        self.engine.drain()
        return ends_s


def check_runnable(policy: Policy, hardware: HardwareProfile, source: WeightSource) -> None:
    """Refuse a policy that the executor cannot run on this machine with these weights."""
    check_same_model(policy.model, source.spec)
    check_machine(policy, hardware)
    check_executable(policy)
    check_lanes(policy, hardware)
    if hardware.uses_cuda and not torch.cuda.is_available():
        raise InputError(
            "machine",
            got="no CUDA device",
            allowed=f"the GPU of {hardware.name}, for which the policy was made",
            hint="searching again with this machine's profile",
        )
