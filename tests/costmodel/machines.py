"""Small models and machines whose optima can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

from costmodel.families import spec_from_config
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.shares import Shares, shares_of
from profiles import ComputeRates, Cpu, Disk, Gpu, HardwareProfile, Link, RateCurve
from tests.plain_models import plain_model

# So fast that it never decides anything.
FAST = 1e30
AMPLE = 10**15
ON_GPU, ON_CPU, ON_DISK = Placement(gpu=1), Placement(cpu=1), Placement(disk=1)


def make_model(**changes: object) -> ModelSpec:
    """Make a Llama of 8 layers: query 256, key 128, gated MLP of 512, 1000 words, bfloat16."""
    shapes: dict[str, object] = {
        "name": "small",
        "num_layers": 8,
        "hidden_size": 256,
        "ffn_size": 512,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "vocab_size": 1000,
        "max_positions": 4096,
        "tied": True,
        "dtype": "bfloat16",
    }
    return plain_model(**(shapes | changes))  # type: ignore[arg-type]  # plain keyword table


# Bytes of the model above, counted by hand.
DECODER_BYTES = 2 * (
    2 * 256  # two norms
    + (256 + 2 * 128) * 256  # queries, keys, values
    + 256 * 256  # output
    + 3 * 512 * 256  # gate, up, down
)
HEAD_BYTES = 2 * (256 + 1000 * 256)
SMALL_BYTES = 8 * DECODER_BYTES + HEAD_BYTES
CACHE_TOKEN_BYTES = 2 * 2 * 128


def make_mixture(**changes: object) -> ModelSpec:
    """Make a Qwen 3 with experts: of the layers of ``make_model``, four, each with 8 experts of
    128, of which a token takes two."""
    config: dict[str, object] = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    }
    return spec_from_config(config | changes, name="small mixture")


def make_compute(
    *, flop: float = FAST, attention: float = FAST, decode: float = FAST, overhead_s: float = 0.0
) -> ComputeRates:
    """Make rates that do not depend on size; all so fast by default that they never matter."""
    return ComputeRates(
        matmul={"bfloat16": RateCurve.constant(flop)},
        attention_prefill={"bfloat16": attention},
        attention_decode={"bfloat16": decode},
        task_overhead_s=overhead_s,
    )


def make_machine(
    *,
    gpu_memory: int | None = None,
    cpu_memory: int = AMPLE,
    disk: int = AMPLE,
    disk_read: float = FAST,
    disk_write: float = FAST,
    h2d: float = FAST,
    d2h: float = FAST,
    gpu: ComputeRates | None = None,
    cpu: ComputeRates | None = None,
) -> HardwareProfile:
    """Make a machine on which nothing costs time or space unless it is named."""

    def link(rate: float) -> Link:
        return Link(
            pinned_bytes_per_s=rate, pageable_bytes_per_s=rate / 2, opposed_bytes_per_s=rate
        )

    return HardwareProfile(
        name="by hand",
        source="tests",
        date="2026-01-01",
        cpu=Cpu(
            name="cpu",
            num_cores=2,
            memory_bytes=cpu_memory,
            memory_bytes_per_s=FAST,
            runtime_bytes=0,
            compute=cpu or make_compute(),
        ),
        disk=Disk(
            free_bytes=disk,
            read=RateCurve.constant(disk_read),
            write=RateCurve.constant(disk_write),
        ),
        gpu=None
        if gpu_memory is None
        else Gpu(
            name="gpu",
            memory_bytes=gpu_memory,
            memory_bytes_per_s=FAST,
            compute=gpu or make_compute(),
            h2d=link(h2d),
            d2h=link(d2h),
        ),
    )


def make_policy(**changes: object) -> Policy:
    """Make a policy of two batches of four, all on the CPU, prompts of 16 and 5 generated.

    A single placement of ``weights`` is that of every component.
    """
    fields: dict[str, object] = {
        "model": make_model(),
        "workload": Workload(prompt_len=16, gen_len=5),
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
        "prefill_batch_size": 2,
        "weights": ON_CPU,
        "cache": ON_CPU,
        "activations": ON_CPU,
    }
    fields |= changes
    model, weights = fields["model"], fields["weights"]
    if isinstance(weights, Placement):
        assert isinstance(model, ModelSpec)
        fields["weights"] = placed_alike(model, weights)
    return Policy(**fields)  # type: ignore[arg-type]  # plain keyword table


def make_shares(
    block_size: int,
    *,
    weights: Placement | Mapping[str, Placement],
    cache: Placement,
    activations: Placement = ON_GPU,
    attended: float = 0.0,
    model: ModelSpec | None = None,
    in_place: float = 0.0,
) -> Shares[float]:
    """Make the shares of a placement; ``attended`` is the fraction of the cache off the GPU, and
    ``in_place`` that of the experts in CPU memory."""
    policy = make_policy(
        model=model or make_model(),
        gpu_batch_size=1,
        num_gpu_batches=block_size,
        prefill_batch_size=1,
        weights=weights,
        cache=cache,
        activations=activations,
        cpu_attention=attended,
        cpu_experts=in_place,
    )
    return shares_of(policy)
