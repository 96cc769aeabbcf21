"""What is fixed when a program is solved (``Problem``) and what it decides (``Shares``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from costmodel.layout import LayerLayout, model_layers, round_up
from costmodel.model_spec import ModelSpec
from costmodel.policy import Policy
from costmodel.workload import Workload
from profiles.aligned_io import PAGE_BYTES
from profiles.hardware import HardwareProfile

# A number, a numpy array or a PuLP expression: formulas use ``+`` and ``*`` only.
Quantity = Any


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that is enumerated outside the program.

    ``in_place`` says that all hidden states live on the compute device, where the layers update
    them in place; otherwise they pass through two staging buffers of a batch each.
    """

    hardware: HardwareProfile
    model: ModelSpec
    workload: Workload
    gpu_batch_size: int
    prefill_batch_size: int
    in_place: bool = True

    @cached_property
    def layers(self) -> tuple[LayerLayout, ...]:
        """Layouts of all layers, embedding and head included."""
        return model_layers(self.model)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(layer.num_bytes for layer in self.layers)

    @cached_property
    def staged_weight_bytes(self) -> int:
        """Bytes of the layers that are staged whole: all but the embedding, which is gathered."""
        return sum(layer.num_bytes for layer in self.layers if layer.kind != "embed")

    @cached_property
    def largest_layer_bytes(self) -> int:
        """Bytes of the largest layer that is staged."""
        return max(layer.num_bytes for layer in self.layers if layer.kind != "embed")

    @cached_property
    def longest_row_bytes(self) -> int:
        """Bytes of the longest row that a cut may fall beside."""
        return max(tensor.row_bytes for layer in self.layers for tensor in layer.tensors)

    @cached_property
    def num_head_chunks(self) -> int:
        """Chunks that the output head is cut into."""
        return sum(layer.kind == "head" for layer in self.layers)

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of keys and values of one token of one sequence in one layer."""
        return 2 * self.model.kv_size * self.model.dtype_bytes

    @property
    def cache_sequence_bytes(self) -> int:
        """Bytes of KV cache of one sequence at full context, all layers."""
        return self.cache_token_bytes * self.workload.context_len * self.model.num_layers

    @property
    def disk_cache_padding(self) -> float:
        """Most bytes on disk per byte of cache: a token's rows of a batch take whole pages."""
        batch_bytes = self.cache_token_bytes * self.gpu_batch_size
        row_bytes = 2 * self.model.head_dim * self.model.dtype_bytes
        # Part of a batch goes to disk in units of the rows that fill a page best.
        unit_bytes = min(batch_bytes, max(1, PAGE_BYTES // row_bytes) * row_bytes)
        return max(round_up(size, PAGE_BYTES) / size for size in (batch_bytes, unit_bytes))

    @property
    def hidden_token_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self.model.hidden_size * self.model.dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The variables, per sequence of the block.

    Dividing by the block size makes the program linear (Charnes and Cooper 1962): ``per_block``
    is ``1 / block_size`` and the weight shares come multiplied by it; shares of cache and
    activations are plain fractions. ``attended`` is the fraction of the whole cache that lies
    off the GPU and is attended on the CPU.

    Staging buffers hold the cache of one batch, not of the block. Per sequence that is a product
    of two variables; the ``*_per_block`` fields carry it, exact where the block size is fixed, a
    McCormick variable where it is not.
    """

    per_block: Quantity
    weights_gpu: Quantity
    weights_cpu: Quantity
    weights_disk: Quantity
    cache_gpu: Quantity
    cache_cpu: Quantity
    cache_disk: Quantity
    attended: Quantity
    cache_cpu_per_block: Quantity
    cache_disk_per_block: Quantity
    attended_per_block: Quantity
    activations_gpu: Quantity
    activations_cpu: Quantity
    activations_disk: Quantity


def shares_of(policy: Policy) -> Shares:
    """Return a policy's fractions as the values of the program's variables."""
    per_block = 1 / policy.block_size
    attended = policy.cpu_attention * (policy.cache.cpu + policy.cache.disk)
    return Shares(
        per_block=per_block,
        weights_gpu=policy.weights.gpu * per_block,
        weights_cpu=policy.weights.cpu * per_block,
        weights_disk=policy.weights.disk * per_block,
        cache_gpu=policy.cache.gpu,
        cache_cpu=policy.cache.cpu,
        cache_disk=policy.cache.disk,
        attended=attended,
        cache_cpu_per_block=policy.cache.cpu * per_block,
        cache_disk_per_block=policy.cache.disk * per_block,
        attended_per_block=attended * per_block,
        activations_gpu=policy.activations.gpu,
        activations_cpu=policy.activations.cpu,
        activations_disk=policy.activations.disk,
    )


def problem_of(policy: Policy, hardware: HardwareProfile) -> Problem:
    """Return the problem that a policy is a point of."""
    compute_share = policy.activations.gpu if hardware.has_gpu else policy.activations.cpu
    return Problem(
        hardware=hardware,
        model=policy.model,
        workload=policy.workload,
        gpu_batch_size=policy.gpu_batch_size,
        prefill_batch_size=policy.prefill_batch_size,
        in_place=compute_share >= 1,
    )
