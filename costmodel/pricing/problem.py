"""What is fixed when a program is solved (``Problem``) and what it decides (``Shares``)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Generic

from costmodel.model.cache import CacheSpec, cache_of
from costmodel.model.layout import CUT_ROWS, LayerLayout, model_layers, round_up
from costmodel.model.spec import LayerSpec, ModelSpec
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.linear_form import LinearForm, Quantity, total
from profiles.aligned_io import PAGE_BYTES
from profiles.compute_rates import ComputeRates
from profiles.hardware import HardwareProfile
from profiles.packing import DEFAULT_GROUP_SIZE, DIRECT_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Decoder layers that are equal: their description, bytes and cache, and how many they are."""

    spec: LayerSpec
    layout: LayerLayout
    cache: CacheSpec
    count: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that is enumerated outside the program.

    Parameters
    ----------
    in_place
        All hidden states live on the compute device, where the layers update them in place;
        otherwise they pass through two staging buffers of a batch each.
    weight_bits, cache_bits
        Bits of an element at rest; ``None`` is the model's own dtype.
    group_size
        Elements that share a scale where they are quantized.
    unpacks_per_batch
        Quantized weights are unpacked for every batch instead of once for every load.
    attention_sparsity
        Fraction of the keys that a query of decode attends to.
    loads_per_block
        Loads of the weights that a block's share of a job pays for: above 1 where the job's last
        block is partly filled.
    """

    hardware: HardwareProfile
    model: ModelSpec
    workload: Workload
    gpu_batch_size: int
    prefill_batch_size: int
    in_place: bool = True
    weight_bits: int | None = None
    cache_bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    unpacks_per_batch: bool = False
    attention_sparsity: float = 1.0
    loads_per_block: float = 1.0

    @cached_property
    def layers(self) -> tuple[LayerLayout, ...]:
        """Layouts of all layers, embedding and head included."""
        return model_layers(self.model, self.weight_bits, self.group_size)

    @cached_property
    def distinct_layers(self) -> tuple[LayerLayout, ...]:
        """The same without repetition: equal decoder layers share one layout."""
        return tuple({id(layer): layer for layer in self.layers}.values())

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(layer.num_bytes for layer in self.layers)

    @cached_property
    def staged_weight_bytes(self) -> int:
        """Bytes of the layers that are staged whole: all but the embedding, which is gathered."""
        return sum(layer.num_bytes for layer in self.layers if layer.kind != "embed")

    @cached_property
    def staged_elements(self) -> int:
        """Elements of the matrices of the layers that are staged whole."""
        return sum(layer.num_matrix_elements for layer in self.layers if layer.kind != "embed")

    @cached_property
    def largest_layer_bytes(self) -> int:
        """Bytes of the largest layer that is staged."""
        return max(layer.num_bytes for layer in self.distinct_layers if layer.kind != "embed")

    @cached_property
    def longest_cut_bytes(self) -> int:
        """Bytes of the rows that a cut keeps together, where they are longest."""
        tensors = (tensor for layer in self.distinct_layers for tensor in layer.tensors)
        return max(tensor.row_bytes * min(CUT_ROWS, tensor.num_rows) for tensor in tensors)

    @cached_property
    def num_head_chunks(self) -> int:
        """Chunks that the output head is cut into."""
        return sum(layer.kind == "head" for layer in self.layers)

    @cached_property
    def cpu_over_tokens(self) -> ComputeRates:
        """The CPU's rates over a cache that lies token by token."""
        return self.hardware.cpu.compute.over_tokens()

    @property
    def packs_weights(self) -> bool:
        """Whether weights are quantized and unpacked for every load."""
        return (self.weight_bits or self.model.full_bits) < self.model.full_bits

    def multiplies_packed(self, rates: ComputeRates) -> bool:
        """Whether decode multiplies packed weights as they lie, on a device with these rates."""
        few = self.weight_bits == 4 and self.gpu_batch_size <= DIRECT_ROWS
        return few and not self.unpacks_per_batch and self.model.dtype in rates.packed_matmul

    @property
    def packs_cache(self) -> bool:
        """Whether the KV cache is quantized and unpacked for every read."""
        return (self.cache_bits or self.model.full_bits) < self.model.full_bits

    @cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The different decoder layers: costs are sums over them."""
        model, bits = self.model, self.cache_bits or self.model.full_bits
        return tuple(
            LayerKind(
                spec=spec,
                layout=self.layers[1 + model.layer_order.index(kind)],
                cache=cache_of(spec, bits, self.group_size, model.dtype_bytes),
                count=count,
            )
            for kind, (spec, count) in enumerate(model.kinds_and_counts)
        )

    @cached_property
    def cache_token_bytes(self) -> int:
        """Bytes of keys and values of one token of one sequence in all layers, at rest."""
        return sum(kind.count * kind.cache.token_bytes for kind in self.layer_kinds)

    @cached_property
    def layer_token_bytes(self) -> int:
        """The same in the layer that keeps most."""
        return max(kind.cache.token_bytes for kind in self.layer_kinds)

    @cached_property
    def unpacked_token_bytes(self) -> int:
        """Bytes of keys and values of one token in all layers, in the dtype of attention."""
        return sum(kind.count * kind.cache.full_token_bytes for kind in self.layer_kinds)

    @property
    def cache_sequence_bytes(self) -> int:
        """Bytes of KV cache of one sequence at full context, all layers."""
        return self.cache_token_bytes * self.workload.context_len

    @cached_property
    def disk_cache_padding(self) -> float:
        """Most bytes on disk per byte of cache: a token's rows of a batch take whole pages."""
        sizes = []
        for kind in self.layer_kinds:
            batch_bytes = kind.cache.token_bytes * self.gpu_batch_size
            # Part of a batch goes to disk in units of the rows that fill a page best.
            unit_bytes = min(batch_bytes, kind.cache.rows_per_page * kind.cache.row_bytes)
            sizes += [batch_bytes, unit_bytes]
        return max(round_up(size, PAGE_BYTES) / size for size in sizes)

    @property
    def hidden_token_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self.model.hidden_size * self.model.dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """What the program knows of one share beside the formulas.

    Parameters
    ----------
    group
        The shares of a group place the same bytes, so that they add up to the whole.
    is_scaled
        The share comes multiplied by ``per_block``.
    needs_product
        Formulas use the share's product with ``per_block``.
    needs_gpu
        The share is zero on a machine without a GPU.
    """

    group: str = ""
    is_scaled: bool = False
    needs_product: bool = False
    needs_gpu: bool = False


VARIABLES = {
    "weights_gpu": Variable(group="weights", is_scaled=True, needs_gpu=True),
    "weights_cpu": Variable(group="weights", is_scaled=True),
    "weights_disk": Variable(group="weights", is_scaled=True),
    "cache_gpu": Variable(group="cache", needs_gpu=True),
    "cache_cpu": Variable(group="cache", needs_product=True),
    "cache_disk": Variable(group="cache", needs_product=True),
    "attended": Variable(needs_gpu=True, needs_product=True),
    "activations_gpu": Variable(group="activations", needs_gpu=True),
    "activations_cpu": Variable(group="activations", needs_product=True),
    "activations_disk": Variable(group="activations", needs_product=True),
}
PRODUCTS = tuple(name for name, variable in VARIABLES.items() if variable.needs_product)


def product_name(name: str) -> str:
    """Return the name of the product of a share and ``per_block``."""
    return f"{name}_per_block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares(Generic[Quantity]):
    """The variables, per sequence of the block.

    Dividing by the block size makes the program linear (Charnes and Cooper 1962): ``per_block``
    is ``1 / block_size`` and the weight shares come multiplied by it; all else are plain
    fractions. ``attended`` is the fraction of the whole cache that lies off the GPU and is
    attended on the CPU. ``whole`` is the constant one, so that every formula is linear in the
    shares without a constant term.

    Some costs need a fraction and its product with ``per_block``: staging buffers hold the cache
    of one batch, not of the block. The ``*_per_block`` fields carry the product, exact where the
    block size is fixed, a McCormick variable where it is not.
    """

    whole: Quantity
    per_block: Quantity
    weights_gpu: Quantity
    weights_cpu: Quantity
    weights_disk: Quantity
    cache_gpu: Quantity
    cache_cpu: Quantity
    cache_disk: Quantity
    attended: Quantity
    activations_gpu: Quantity
    activations_cpu: Quantity
    activations_disk: Quantity
    cache_cpu_per_block: Quantity
    cache_disk_per_block: Quantity
    attended_per_block: Quantity
    activations_cpu_per_block: Quantity
    activations_disk_per_block: Quantity

    def of_one_batch(self, gpu_batch_size: int) -> Shares[Quantity]:
        """Return the shares times the fraction of the block that one batch is.

        Formulas then give what one batch takes per sequence of the block. The cache on the GPU
        is not needed for that, nor are the weights.
        """
        scaled = {name: getattr(self, product_name(name)) * gpu_batch_size for name in PRODUCTS}
        return replace(self, whole=self.per_block * gpu_batch_size, **scaled)

    def value_of(self, form: LinearForm) -> Quantity:
        """Return a linear form of the shares at these shares."""
        parts: list[Quantity] = [getattr(self, n) * factor for n, factor in form.terms.items()]
        return total(parts or [self.whole * 0.0])


SHARE_NAMES = tuple(f.name for f in fields(Shares))


# The variables themselves: evaluated on them, a formula gives its coefficients.
UNIT_SHARES = Shares(**{name: LinearForm({name: 1.0}) for name in SHARE_NAMES})


def shares_of(policy: Policy) -> Shares[float]:
    """Return a policy's fractions as the values of the program's variables."""
    per_block = 1 / policy.block_size
    plain = {
        f"{kind}_{tier}": getattr(placement, tier)
        for kind, placement in (("cache", policy.cache), ("activations", policy.activations))
        for tier in ("gpu", "cpu", "disk")
    }
    plain["attended"] = policy.cpu_attention * (policy.cache.cpu + policy.cache.disk)
    return Shares(
        whole=1.0,
        per_block=per_block,
        weights_gpu=policy.weights.gpu * per_block,
        weights_cpu=policy.weights.cpu * per_block,
        weights_disk=policy.weights.disk * per_block,
        **plain,
        **{product_name(name): plain[name] * per_block for name in PRODUCTS},
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
        weight_bits=policy.weight_bits,
        cache_bits=policy.cache_bits,
        group_size=policy.group_size,
        unpacks_per_batch=policy.unpacks_per_batch,
        attention_sparsity=policy.attention_sparsity,
    )
