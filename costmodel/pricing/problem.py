"""The inputs of one linear program (``Problem``); its variables are ``Shares``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from costmodel.model.layout import has_small_chunks, round_up
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.buffers import expert_staging
from costmodel.pricing.sizes import LayerKind, ModelSizes, layer_kinds_of, sizes_of
from profiles.aligned_io import PAGE_BYTES
from profiles.compute_rates import ComputeRates
from profiles.hardware import HardwareProfile
from profiles.packing import CODED_GROUP_SIZE, DEFAULT_GROUP_SIZE, DIRECT_ROWS, GPU_DIRECT_ROWS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that is enumerated outside the program.

    Parameters
    ----------
    hidden_in_place
        Whether all hidden states are stored on the compute device, where the layers update them in
        place. Otherwise they pass through staging buffers of a batch each. ``None`` leaves it open:
        they are stored on any tier, and staging buffers are not counted.
    open_prefill_batch_sizes
        The choices, in increasing order, where the prefill batch size is still open. Every formula
        then takes the best of them, so that the program bounds each choice.
    num_batches
        Fewest and most batches in the block. Where they differ, formulas take the better of them.
    loads_on_demand
        See ``Policy``.
    cpu_experts
        Whether the CPU, beside a GPU, may multiply experts in its memory in decode.
    weight_bits, cache_bits
        Bits of an element at rest; ``None`` is the model's own dtype.
    group_size
        Elements that share a scale where they are quantized.
    unpacks_per_batch
        Whether quantized weights are unpacked for every batch instead of for every load.
    attention_sparsity
        Fraction of the keys that a query of decode attends to.
    loads_per_block
        Loads of the weights that one block pays for. It is above 1 where the last block of the job
        is partly filled.
    lanes
        The cache and the rows of lanes; ``None`` runs the sequences of a block in step.
    blocks_in_flight
        Blocks whose caches are kept at the same time (see ``Policy.blocks_in_flight``).
    experts
        Where the experts of a policy are; ``None`` in a search, which may put them anywhere.
    stages_cache
        Whether lanes keep the cache of some layers on disk, and have buffers to stage it in.
    """

    hardware: HardwareProfile
    model: ModelSpec
    workload: Workload
    gpu_batch_size: int
    prefill_batch_size: int
    hidden_in_place: bool | None = True
    open_prefill_batch_sizes: tuple[int, ...] = ()
    weight_bits: int | None = None
    cache_bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    unpacks_per_batch: bool = False
    attention_sparsity: float = 1.0
    loads_per_block: float = 1.0
    num_batches: tuple[int, int] = (1, 1)
    loads_on_demand: bool = False
    cpu_experts: bool = False
    lanes: LanePolicy | None = None
    blocks_in_flight: int = 1
    stages_cache: bool = False
    experts: Placement | None = None

    @property
    def is_open(self) -> bool:
        """Whether the problem stands for several, because some choices are still open."""
        return self.hidden_in_place is None or bool(self.open_prefill_batch_sizes)

    @property
    def batches_at_once(self) -> tuple[int, int]:
        """Fewest and most batches that pass through experts together (see ``Plan``)."""
        fewest, most = self.num_batches
        if self.hidden_in_place is None:
            return 1, most
        return (fewest, most) if self.hidden_in_place else (1, 1)

    @property
    def head_batches_at_once(self) -> tuple[int, int]:
        """Fewest and most batches that pass through a chunk of the head together (see ``Plan``)."""
        in_chunks = self.sizes.has_small_chunks and self.sizes.num_head_chunks > 1
        return self.batches_at_once if in_chunks and self.lanes is None else (1, 1)

    @property
    def prefill_batch_sizes(self) -> tuple[int, ...]:
        """The prefill batch size, or its choices."""
        return self.open_prefill_batch_sizes or (self.prefill_batch_size,)

    @cached_property
    def sizes(self) -> ModelSizes:
        """The sizes of the weights with the bits of this problem."""
        return sizes_of(
            self.model,
            self.weight_bits,
            self.group_size,
            has_small_chunks=has_small_chunks(self.model, has_gpu=self.hardware.has_gpu),
        )

    @property
    def walks_experts(self) -> bool:
        """See ``Policy.walks_experts``."""
        return self.loads_on_demand and not self.hardware.has_gpu and self.lanes is None

    @property
    def expert_staging(self) -> str:
        """See ``Plan.expert_staging``."""
        return expert_staging(
            loads_on_demand=self.loads_on_demand,
            multiplies_in_place=self.cpu_experts,
            has_gpu=self.hardware.has_gpu,
            has_lanes=self.lanes is not None,
        )

    @property
    def orders_experts(self) -> bool:
        """Whether it counts that the most used experts are on the fastest tiers."""
        return self.loads_on_demand and not self.cpu_experts and self.workload.expert_skew > 0

    @property
    def rarest_on_disk(self) -> float:
        """Share of the experts that are on disk, those that are chosen the least. In a search, the
        least share that the machine's memory leaves there."""
        gpu = self.hardware.gpu
        memory = self.hardware.cpu.memory_bytes + (gpu.memory_bytes if gpu else 0)
        return self._least_outside(memory) if self.experts is None else self.experts.disk

    @property
    def rarest_off_gpu(self) -> float:
        """The same for the share of the experts that are off the GPU."""
        gpu = self.hardware.gpu
        memory = gpu.memory_bytes if gpu else 0
        return self._least_outside(memory) if self.experts is None else 1 - self.experts.gpu

    def _least_outside(self, memory_bytes: int) -> float:
        size = self.sizes.component_bytes.get("experts", 0)
        # One expert in a thousand stands for the rarest of all.
        return max(1e-3, 1 - memory_bytes / size) if size else 1.0

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The classes of components, each of which has a placement."""
        return self.model.component_names

    @cached_property
    def cpu_over_tokens(self) -> ComputeRates:
        """The CPU's rates for a cache that is stored token by token."""
        return self.hardware.cpu.compute.over_tokens()

    @property
    def packs_weights(self) -> bool:
        """Whether weights are quantized and unpacked for every load."""
        return (self.weight_bits or self.model.full_bits) < self.model.full_bits

    @property
    def keeps_encodings(self) -> bool:
        """Whether weights are stored encoded, as the checkpoint has them."""
        return self.model.is_encoded and not self.packs_weights

    def multiplies_packed(self, rates: ComputeRates) -> bool:
        """Whether decode on a device with these rates multiplies weights without unpacking them."""
        return self.gpu_batch_size <= self.direct_rows(rates)

    def direct_rows(self, rates: ComputeRates) -> float:
        """Return the most rows of a product that a device with these rates multiplies by weights
        without unpacking them; infinite where prefill does so too."""
        dtype = self.model.dtype
        if self.weight_bits != 4 or self.unpacks_per_batch or dtype not in rates.packed_matmul:
            return 0
        gpu = self.hardware.gpu
        if gpu is not None and not gpu.emulated and rates is gpu.compute:
            return GPU_DIRECT_ROWS
        all_rows = rates.multiplies_any_rows_packed(dtype) and self.group_size == CODED_GROUP_SIZE
        return math.inf if all_rows else DIRECT_ROWS

    @property
    def unpacks_layers(self) -> bool:
        """Whether a layer's compressed matrices are unpacked at some time, for all batches.

        A CPU multiplies those that the checkpoint has encoded directly; a GPU does not.
        """
        if self.packs_weights:
            return self.direct_rows(self.hardware.compute) < math.inf
        return self.model.is_encoded and self.hardware.uses_cuda

    @property
    def packs_cache(self) -> bool:
        """Whether the KV cache is quantized and unpacked for every read."""
        return (self.cache_bits or self.model.full_bits) < self.model.full_bits

    @property
    def shares_prefixes(self) -> bool:
        """See ``Policy.shares_prefixes``."""
        has_lanes = self.lanes is not None
        return has_lanes and not self.packs_cache and not self.workload.scores_prompts

    @cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The different decoder layers: costs are sums over them."""
        bits = self.cache_bits or self.model.full_bits
        return layer_kinds_of(self.sizes, bits)

    def layer_cache_bytes(self, num_tokens: int) -> int:
        """Return the bytes of ``num_tokens`` tokens of one sequence in the layer with the largest
        cache, at rest."""
        caches = [kind.cache for kind in self.layer_kinds]
        return max(cache.token_bytes * cache.num_slots(num_tokens) for cache in caches)

    @cached_property
    def unpacked_token_bytes(self) -> int:
        """Bytes of keys and values of one token in all layers, in the dtype of attention."""
        return sum(kind.count * kind.cache.full_token_bytes for kind in self.layer_kinds)

    @cached_property
    def cache_sequence_bytes(self) -> int:
        """Bytes of KV cache of a sequence of each block in flight, at full context, all layers."""
        context_len = self.workload.context_len
        return self.blocks_in_flight * sum(
            kind.count * kind.cache.token_bytes * kind.cache.num_slots(context_len)
            for kind in self.layer_kinds
        )

    @cached_property
    def disk_cache_padding(self) -> float:
        """Most bytes on disk per byte of cache: a token of a segment takes whole pages. Lanes have
        pages of many tokens."""
        if self.lanes is not None:
            return 1.0
        sizes = []
        for kind in self.layer_kinds:
            batch_bytes = kind.cache.token_bytes * self.gpu_batch_size
            # A part of a batch on disk is a multiple of the rows that fill a page.
            unit_bytes = min(batch_bytes, kind.cache.rows_per_page * kind.cache.row_bytes)
            sizes += [batch_bytes, unit_bytes]
        return max(round_up(size, PAGE_BYTES) / size for size in sizes)

    @property
    def hidden_token_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self.model.hidden_size * self.model.dtype_bytes


def problem_of(policy: Policy, hardware: HardwareProfile) -> Problem:
    """Return the problem that a policy is a point of."""
    compute_share = policy.activations.gpu if hardware.has_gpu else policy.activations.cpu
    return Problem(
        hardware=hardware,
        model=policy.model,
        workload=policy.workload,
        gpu_batch_size=policy.gpu_batch_size,
        prefill_batch_size=policy.prefill_batch_size,
        hidden_in_place=compute_share >= 1,
        weight_bits=policy.weight_bits,
        cache_bits=policy.cache_bits,
        group_size=policy.group_size,
        unpacks_per_batch=policy.unpacks_per_batch,
        attention_sparsity=policy.attention_sparsity,
        num_batches=(policy.num_gpu_batches, policy.num_gpu_batches),
        loads_on_demand=policy.loads_on_demand,
        cpu_experts=policy.cpu_experts > 0 and hardware.has_gpu,
        lanes=policy.lanes,
        blocks_in_flight=policy.blocks_in_flight,
        stages_cache=policy.lanes is not None and policy.cache.disk > 0,
        experts=policy.weights.get("experts"),
    )
