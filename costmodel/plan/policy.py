"""A policy: the placement of every byte and the size of the block. And its JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from costmodel.families import family_named
from costmodel.model.spec import ModelSpec
from costmodel.plan.workload import Workload
from profiles.errors import InputError
from profiles.files import dump_json, from_json, read_json, to_json
from profiles.hardware import HardwareProfile
from profiles.outputs import write_output
from profiles.packing import DEFAULT_GROUP_SIZE, check_group_size
from profiles.start import called

SCHEMA_VERSION = 3
# Files of these versions are read: version 2 had neither lengths nor lanes, and all else was alike.
READABLE_VERSIONS = (2, 3)
TIERS = ("gpu", "cpu", "disk")
# Fractions written by hand carry a few digits; more than this is a mistake, not rounding.
SUM_TOLERANCE = 1e-6
# More is a mistake, and overflows floats later.
MAX_SEQUENCES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Fractions of one kind of bytes on each tier; they sum to one."""

    gpu: float = 0.0
    cpu: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        for tier in TIERS:
            value = getattr(self, tier)
            if not math.isfinite(value) or not 0 <= value <= 1:
                raise InputError(f"placement.{tier}", got=value, allowed="a fraction in [0, 1]")
        total = self.gpu + self.cpu + self.disk
        if abs(total - 1) > SUM_TOLERANCE:
            raise InputError(
                "placement",
                got=f"gpu {self.gpu} + cpu {self.cpu} + disk {self.disk} = {total:.6g}",
                allowed="fractions that sum to 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The cost model's prediction for a policy: for one block, or for the job of lanes.

    Parameters
    ----------
    throughput_tok_per_s
        Generated tokens of one block over its latency, prompts included.
    latency_s, prefill_s, decode_s
        Seconds for one block and for its two phases. Lanes have one phase, which counts as decode.
    lower_bound_s
        Sum over the phases, or the passes of lanes, of the busiest channel's seconds at the
        profile's rates, without fixed costs, contention, or waits between channels.
    bottleneck
        The limit with the largest share of the block's time: a channel, two channels that slow
        each other down, the CPU's memory, or the path of one batch through the layers.
    channel_s
        Busy seconds per channel over the block.
    peak_bytes
        Peak use per tier, everything included.
    """

    throughput_tok_per_s: float
    latency_s: float
    prefill_s: float
    decode_s: float
    lower_bound_s: float
    bottleneck: str
    channel_s: Mapping[str, float]
    peak_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePolicy:
    """The continuous schedule: places for sequences, filled again as sequences end.

    Parameters
    ----------
    pool_tokens
        Tokens of the KV cache of all sequences at work together.
    pass_rows
        Most tokens that one pass computes: one of each sequence that decodes, and all of each
        prompt that begins.
    chunk_rows
        Tokens of a batch that are computed at once, or the sequences that decode if they are more.
        Prompts are cut at the end of a chunk; no token depends on it.
    """

    pool_tokens: int
    pass_rows: int
    chunk_rows: int = 512

    def __post_init__(self) -> None:
        for name in ("pool_tokens", "pass_rows", "chunk_rows"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"policy.lanes.{name}", got=getattr(self, name), allowed="1 or more"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One point of the space that the program searches and the executor runs.

    Parameters
    ----------
    gpu_batch_size
        Sequences computed at once.
    num_gpu_batches
        Batches that share one load of a layer's weights.
    prefill_batch_size
        Sequences computed at once inside a batch during prefill, at most ``gpu_batch_size``.
        It limits the workspace; long prompts fill a matrix product with few sequences.
    weights
        The placement of each class of components (see ``ModelSpec.component_names``). In a file,
        one placement may stand for all classes.
    cpu_attention
        Fraction of the KV cache off the GPU that the CPU attends to in place; the rest is
        fetched. It is 1 without a GPU, where the CPU does all attention.
    cpu_experts
        Beside a GPU, the fraction of the experts in CPU memory that the CPU multiplies in place in
        decode; the rest is sent to the GPU.
    weight_bits, cache_bits
        Bits of one element: those of the model's dtype, or 8 or 4 for group-wise quantization.
    group_size
        Quantized elements that share a scale and a minimum. Groups run along the rows of a matrix,
        and along the head dimension of the cache.
    unpacks_per_batch
        Whether quantized weights are unpacked for every batch, one matrix at a time, as in FlexGen.
        Otherwise they are unpacked for every load, a layer at a time: more memory, less time.
    attention_sparsity
        Fraction of the keys that each query of decode attends to; 1 is dense attention.
    loads_on_demand
        Whether decode loads only the experts that the router has chosen, after its choice; without
        a GPU, prefill too.
    hardware
        The machine and the budgets of the search, without raw measurements.
    lanes
        Sequences begin as others end, each with its own number of tokens; ``None`` runs the
        sequences of a block in step. The block size is then the most sequences at work.
    blocks_in_flight
        Blocks whose caches are kept at the same time: 1, or the stages of the pipeline that
        ``model.stage`` is one of. The stages work on a block each.
    """

    model: ModelSpec
    workload: Workload
    gpu_batch_size: int
    num_gpu_batches: int
    prefill_batch_size: int
    weights: Mapping[str, Placement]
    cache: Placement
    activations: Placement
    cpu_attention: float = 1.0
    cpu_experts: float = 0.0
    weight_bits: int = 16
    cache_bits: int = 16
    group_size: int = DEFAULT_GROUP_SIZE
    unpacks_per_batch: bool = False
    attention_sparsity: float = 1.0
    loads_on_demand: bool = False
    hardware: HardwareProfile | None = None
    predicted: Prediction | None = None
    schema_version: int = SCHEMA_VERSION
    lanes: LanePolicy | None = None
    blocks_in_flight: int = 1

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InputError(
                "policy schema_version", got=self.schema_version, allowed=str(SCHEMA_VERSION)
            )
        # The file may have been edited: only known families can be run.
        family_named(self.model.family)
        if set(self.weights) != set(self.model.component_names):
            raise InputError(
                "policy.weights",
                got=", ".join(self.weights) or "nothing",
                allowed=f"each of {', '.join(self.model.component_names)}",
            )
        for name in ("gpu_batch_size", "num_gpu_batches", "prefill_batch_size"):
            if not 1 <= getattr(self, name) <= MAX_SEQUENCES:
                raise InputError(
                    f"policy.{name}", got=getattr(self, name), allowed=f"1 to {MAX_SEQUENCES}"
                )
        if self.blocks_in_flight < 1 or (self.blocks_in_flight > 1 and self.model.stage is None):
            raise InputError(
                "policy.blocks_in_flight",
                got=self.blocks_in_flight,
                allowed="1 for a whole model, or the number of stages",
            )
        if self.prefill_batch_size > self.gpu_batch_size:
            raise InputError(
                "policy.prefill_batch_size",
                got=self.prefill_batch_size,
                allowed=f"at most gpu_batch_size {self.gpu_batch_size}",
            )
        for name in ("cpu_attention", "cpu_experts", "attention_sparsity"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"policy.{name}", got=getattr(self, name), allowed="a fraction in [0, 1]"
                )
        if "experts" not in self.weights:
            self._refuse_experts()
        check_group_size("policy.group_size", self.group_size)
        full = self.model.full_bits
        for name in ("weight_bits", "cache_bits"):
            if getattr(self, name) not in (full, 8, 4):
                raise InputError(
                    f"policy.{name}",
                    got=getattr(self, name),
                    allowed=f"{full} (the model's {self.model.dtype}), 8 or 4",
                )

    def walks_experts(self, *, has_gpu: bool) -> bool:
        """Whether a CPU loads the experts of sequences in step on demand, a chunk at a time.

        The prompts' experts, too. One chunk is loaded while another is computed.
        """
        return self.loads_on_demand and not has_gpu and self.lanes is None

    def _refuse_experts(self) -> None:
        """Refuse fields that only a model with experts has a use for."""
        for name, unused in (("cpu_experts", 0), ("loads_on_demand", False)):
            value = getattr(self, name)
            if value != unused:
                raise InputError(
                    f"policy.{name}",
                    got=str(value).lower(),
                    allowed=f"{str(unused).lower()}, because {self.model.name} has no experts",
                )

    @property
    def block_size(self) -> int:
        """Sequences that share one load of the weights."""
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def shares_prefixes(self) -> bool:
        """Whether lanes compute once what their prompts begin with in common.

        Prompts attend to keys as they were before a cache packed them. Scores need all tokens.
        """
        is_packed = self.cache_bits < self.model.full_bits
        return self.lanes is not None and not is_packed and not self.workload.scores_prompts

    @property
    def is_compressed(self) -> bool:
        """Whether the results differ from those of the model in its own dtype."""
        bits = min(self.weight_bits, self.cache_bits)
        return bits < self.model.full_bits or self.attention_sparsity < 1

    def save(self, path: Path) -> None:
        """Write the policy as JSON, whole or not at all."""
        write_output(path, partial(dump_json, to_json(self)))

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy; raises ``InputError`` with file and key for an invalid one."""
        raw = read_json(path, "policy")
        if "model" not in raw:
            raise InputError(
                f"policy {path}",
                got="no key 'model'",
                allowed=f"a file that {called('costmodel.search')} wrote",
            )
        if raw.get("schema_version", SCHEMA_VERSION) in READABLE_VERSIONS:
            raw["schema_version"] = SCHEMA_VERSION
        else:
            raise InputError(
                f"policy {path}",
                got=f"schema_version {raw['schema_version']}",
                allowed=f"{SCHEMA_VERSION}; another version of this program wrote the policy",
                hint=called("costmodel.search"),
            )
        weights = raw.get("weights")
        if isinstance(weights, dict) and weights and set(weights) <= set(TIERS):
            # One placement for all components, as people write it by hand.
            model = from_json(ModelSpec, raw.get("model"), f"policy {path}.model")
            raw["weights"] = dict.fromkeys(model.component_names, weights)
        return from_json(cls, raw, f"policy {path}")


def placed_alike(model: ModelSpec, placement: Placement) -> dict[str, Placement]:
    """Return one placement for all components of a model."""
    return dict.fromkeys(model.component_names, placement)
