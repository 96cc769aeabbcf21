"""Predict four mixtures of experts on the recorded machines, and published runs of other systems.

Two workloads on each recorded machine: a job of 512 prompts (512 + 128 tokens), and one prompt of
the same lengths, of which decode counts. A published run is predicted on its machine, rebuilt from
data sheets or recorded: by the policy that our search finds, and, where the source tells its
batches, also by that one. Nothing is run. The table goes to stderr, one JSON line to stdout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from published_mixtures import DECODE, PREFILL, WHOLE, Published, four_bits, published_runs
from rebuilt_machines import with_kernels
from workload_run import BenchParser, circumstances, keep_result, say

from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.price import limits_by_phase
from costmodel.schedule.prediction import predict
from profiles.command import run
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.recorded import recorded_names, recorded_profile

JOB = Workload(prompt_len=512, gen_len=128, num_prompts=512)
ONE = replace(JOB, num_prompts=1)


def main(arguments: list[str]) -> None:
    """Print a line for each machine and model, and for each published run."""
    flags = BenchParser(
        "mixtures_paper.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/mixtures-paper.json",
    )
    add = flags.add_argument
    add("--only", choices=("recorded", "published"), help="leave the other table out")
    chosen = flags.parse_args(arguments)
    result: dict[str, Any] = {"benchmark": "mixtures of experts, on paper"}
    if chosen.only != "published":
        result["recorded"] = list(_recorded())
    if chosen.only != "recorded":
        result["published"] = [_compare(published) for published in published_runs()]
    keep_result(chosen, result | circumstances("mixtures_paper.py", arguments))


def _models() -> dict[str, ModelSpec]:
    """Return the models by what they are called, in the bytes of files that people run."""
    return {
        "gpt-oss-120b, MXFP4": load_model_spec("gpt-oss-120b"),
        "GLM-4.5-Air, 4 bits": four_bits("glm-4.5-air"),
        "Qwen3-235B-A22B, 4 bits": four_bits("qwen3-235b-a22b"),
        "DeepSeek-V3, 4 bits": four_bits("deepseek-v3"),
        "DeepSeek-V3, FP8": load_model_spec("deepseek-v3"),
    }


def _recorded() -> Iterator[dict[str, Any]]:
    for name, model in _models().items():
        for machine in recorded_names():
            row: dict[str, Any] = {"model": name, "machine": machine}
            try:
                row |= _of_machine(with_kernels(recorded_profile(machine)), model)
            except InfeasibleError as error:
                row["error"] = str(error)
            yield row
            say(f"{name:24} {machine:12} {_told(row)}")


def _of_machine(machine: HardwareProfile, model: ModelSpec) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for what, work, metric in (("job", JOB, WHOLE), ("one", ONE, DECODE)):
        policy, hardware, rate = _search(machine, model, work, metric)
        limits = limits_by_phase(policy, hardware)
        limit = predict(policy, hardware).bottleneck if metric == WHOLE else limits[metric]
        row[what] = {"tok_per_s": rate, "limit": limit, "policy": _short(policy)}
    return row


def _search(
    machine: HardwareProfile, model: ModelSpec, work: Workload, metric: str
) -> tuple[Policy, HardwareProfile, float]:
    found = search(machine, model, work)
    rate = found.job_tok_per_s if metric == WHOLE else _rate(found.policy, found.hardware, metric)
    return found.policy, found.hardware, rate


def _rate(policy: Policy, hardware: HardwareProfile, metric: str) -> float:
    """Return tokens over the seconds of a phase, or generated tokens over both."""
    found, work = predict(policy, hardware), policy.workload
    if metric == PREFILL:
        return policy.block_size * work.prompt_len / found.prefill_s
    if metric == DECODE:
        return policy.block_size * (work.gen_len - 1) / found.decode_s
    return found.throughput_tok_per_s


def _told(row: dict[str, Any]) -> str:
    if "error" in row:
        return "does not fit"
    return "; ".join(
        f"{what} {row[what]['tok_per_s']:.4g} token/s, {row[what]['limit']}"
        for what in ("job", "one")
    )


def _compare(published: Published) -> dict[str, Any]:
    metric, work = published.metric, published.workload
    policy, hardware, rate = _search(published.machine, published.model, work, metric)
    phase = "decode" if metric == WHOLE else metric
    row = {
        "system": published.system,
        "setup": published.setup,
        "source": published.source,
        "model": published.model.name,
        "metric": metric,
        "published_tok_per_s": published.tok_per_s,
        "predicted_tok_per_s": rate,
        "ratio": rate / published.tok_per_s,
        "limit": limits_by_phase(policy, hardware)[phase],
        "policy": _short(policy),
    }
    if published.batches is not None:
        theirs = _policy_of(published)
        own = _rate(theirs, published.machine, metric)
        row |= {
            "their_policy_tok_per_s": own,
            "their_policy_ratio": own / published.tok_per_s,
            "their_policy_limit": limits_by_phase(theirs, published.machine)[phase],
        }
    own_words = ""
    if "their_policy_ratio" in row:
        own_words = f"; with its own batches {row['their_policy_ratio']:.2f}"
    say(
        f"{published.system:14} {published.setup:22} {published.model.name:14} {metric:9}"
        f" published {published.tok_per_s:7.4g}, predicted {rate:7.4g}"
        f" ({row['ratio']:.2f}{own_words}), {row['limit']}"
    )
    return row


def _policy_of(published: Published) -> Policy:
    """Return the source's policy: weights and cache in CPU memory, whose CPU attends."""
    assert published.batches is not None
    size, count = published.batches
    return Policy(
        model=published.model,
        workload=replace(published.workload, num_prompts=size * count),
        gpu_batch_size=size,
        num_gpu_batches=count,
        prefill_batch_size=min(size, max(1, 8192 // published.workload.prompt_len)),
        weights=placed_alike(published.model, Placement(cpu=1)),
        cache=Placement(cpu=1),
        activations=Placement(gpu=1),
        cpu_attention=1.0,
        weight_bits=published.model.full_bits,
        cache_bits=published.model.full_bits,
    )


def _short(policy: Policy) -> dict[str, Any]:
    """Return what decides a policy's speed."""
    experts = policy.weights.get("experts", Placement(cpu=1))
    return {
        "batches": f"{policy.num_gpu_batches} x {policy.gpu_batch_size}",
        "experts": {"gpu": experts.gpu, "cpu": experts.cpu, "disk": experts.disk},
        "cache_gpu": policy.cache.gpu,
        "cpu_attention": policy.cpu_attention,
        "cpu_experts": policy.cpu_experts,
        "loads_on_demand": policy.loads_on_demand,
    }


if __name__ == "__main__":
    run(main)
