"""Published runs of mixtures of experts, with the machines, models and workloads behind them."""

from __future__ import annotations

from dataclasses import dataclass

import rebuilt_machines as machines

from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.loading import load_model_spec
from costmodel.model.shapes import component_shapes, embedding_shapes, head_shapes
from costmodel.model.spec import ModelSpec
from costmodel.plan.workload import Workload
from profiles.encodings import find_encoding
from profiles.hardware import HardwareProfile
from profiles.recorded import recorded_profile

PREFILL, DECODE, WHOLE = "prefill", "decode", "whole run"
MOE_LIGHTNING = "https://arxiv.org/abs/2411.11217"
MOE_GEN = "https://github.com/EfficientMoE/MoE-Gen"
GPUSTACK = "https://docs.gpustack.ai/latest/performance-lab/gpt-oss-120b"
KTRANSFORMERS = (
    "https://github.com/kvcache-ai/ktransformers/blob/main/doc/en/DeepseekR1_V3_tutorial.md"
)
TENCENT = "https://xlab.tencent.com/cn/2025/03/16/"
MAESTRO = (
    "https://ai-maestro.online/"
    "drastically-improve-prompt-processing-speed-for-n-cpu-moe-partially-offloaded-models-8/"
)
I9 = "https://gokawiil.com/article/74814"
ONE_PROMPT = Workload(prompt_len=512, gen_len=128, num_prompts=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published run.

    Parameters
    ----------
    metric
        ``prefill``: prompt tokens over its seconds. ``decode``: generated tokens over its seconds.
        ``whole run``: generated tokens over both.
    tok_per_s
        What was measured.
    batches
        Sequences of a batch and batches of a block, where they are known: the policy is then that
        of the source (all in CPU memory, which attends), and ours is told beside it.
    """

    system: str
    setup: str
    source: str
    machine: HardwareProfile
    model: ModelSpec
    workload: Workload
    metric: str
    tok_per_s: float
    batches: tuple[int, int] | None = None


def in_bits(model: ModelSpec, *encodings: str) -> ModelSpec:
    """Store every matrix in the first of the encodings that its width permits."""

    def rows_of(number: int, name: str) -> list[EncodedRows]:
        parts = [embedding_shapes(model), head_shapes(model, model.vocab_size, is_first=True)]
        if number >= 0:
            parts = [s for s, _ in component_shapes(model, model.layer(number)).values()]
        rows, width = next(shapes[name] for shapes in parts if name in shapes)
        fitting = (name for name in encodings if find_encoding(name).fits(width))
        return [EncodedRows(tensor=name, rows=rows, encoding=next(fitting))]

    return with_encodings(model, rows_of)


def four_bits(name: str) -> ModelSpec:
    """Return a model as llama.cpp has it in four bits: blocks of 256, or of 32 in narrow rows."""
    return in_bits(load_model_spec(name), "Q4_K", "Q4_0")


def published_runs() -> list[Published]:
    """Return the published runs that are compared."""
    return [*_of_moe_lightning(), *_of_moe_gen(), *_of_vllm(), *_of_one_user()]


def _of_moe_lightning() -> list[Published]:
    mixtral = load_model_spec("mixtral-8x7b").with_dtype("float16")
    # MT-Bench: prompts of 77 tokens on average; padded, all are as long as the longest, 418.
    return [
        Published(
            system="MoE-Lightning",
            setup=setup,
            source=MOE_LIGHTNING,
            machine=machine,
            model=mixtral,
            workload=Workload(prompt_len=prompt_len, gen_len=128),
            metric=WHOLE,
            tok_per_s=rate,
            batches=batches,
        )
        for setup, machine, prompt_len, rate, batches in (
            ("T4, padded", machines.T4, 418, 30.1, None),
            ("L4", machines.L4, 77, 294.0, (164, 16)),
        )
    ]


def _of_moe_gen() -> list[Published]:
    return [
        Published(
            system="MoE-Gen",
            setup="A5000",
            source=MOE_GEN,
            machine=machine,
            model=load_model_spec(name),
            workload=Workload(prompt_len=512, gen_len=256),
            metric=metric,
            tok_per_s=rate,
        )
        for name, machine, prefill, decode in (
            ("mixtral-8x7b", machines.A5000, 2790, 469),
            ("mixtral-8x22b", machines.A5000, 907, 91),
            ("deepseek-v2", machines.A5000, 787, 31),
            ("deepseek-r1", machines.A5000_1TB, 204, 17),
        )
        for metric, rate in ((PREFILL, prefill), (DECODE, decode))
    ]


def _of_vllm() -> list[Published]:
    """Return runs with all in GPU memory, whose requests begin as others end."""
    # The second is told as 14,386 token/s, prompts and answers together.
    return [
        Published(
            system="vLLM",
            setup=machine,
            source=f"{GPUSTACK}/{machine.partition('-')[0]}",
            machine=machines.with_kernels(recorded_profile(machine)),
            model=load_model_spec("gpt-oss-120b"),
            workload=Workload(prompt_len=2000, gen_len=100, num_prompts=500),
            metric=WHOLE,
            tok_per_s=rate,
        )
        for machine, rate in (("a100-80gb", 433.3), ("h100-80gb", 14386 / 21))
    ]


def _of_one_user() -> list[Published]:
    oss = load_model_spec("gpt-oss-120b")
    deepseek = four_bits("deepseek-v3")
    eight_bits = in_bits(load_model_spec("deepseek-v3"), "Q8_0")
    mine, theirs = (
        machines.with_kernels(recorded_profile(name)) for name in ("rtx3090-pc", "rtx4090-pc")
    )
    rows: tuple[tuple[str, str, str, HardwareProfile, ModelSpec, str, float], ...] = (
        ("llama.cpp", "RTX 3090, a PC", MAESTRO, mine, oss, DECODE, 33),
        ("llama.cpp", "RTX 4090, a PC", "reported", theirs, oss, DECODE, 22),
        ("llama.cpp", "8 GB GPU, i9-14900K", I9, machines.I9, oss, DECODE, 25.6),
        ("KTransformers", "RTX 4090, Xeon", KTRANSFORMERS, machines.XEON, deepseek, PREFILL, 54.2),
        ("KTransformers", "RTX 4090, Xeon", KTRANSFORMERS, machines.XEON, deepseek, DECODE, 8.73),
        ("llama.cpp", "EPYC 9135, no GPU", TENCENT, machines.EPYC_9135, eight_bits, DECODE, 7.17),
    )
    return [
        Published(
            system=system,
            setup=setup,
            source=source,
            machine=machine,
            model=model,
            workload=ONE_PROMPT,
            metric=metric,
            tok_per_s=rate,
        )
        for system, setup, source, machine, model, metric, rate in rows
    ]
