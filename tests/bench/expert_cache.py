"""Which experts to keep in memory: the most used ones of earlier runs, or the latest used (LRU).

Runs a small model of random weights with the experts of a preset, and keeps which experts each pass
needs in each layer. For several sizes of memory, it counts the experts that must be loaded in
decode: with those resident that another run has used most, with those that the same run uses most,
and with a cache of the latest used. One JSON line goes to stdout.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from workload_run import BenchParser, circumstances, config_of, keep_result, say

from costmodel.families import spec_from_config
from costmodel.model.expert_use import chances
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from executor.checkpoint.dummy import DummyCheckpoint
from executor.model.routing import Routing
from executor.model.sampling import Sampler
from executor.run.runner import Runner
from profiles.command import run
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile

SMALL = {"hidden_size": 512, "moe_intermediate_size": 64, "vocab_size": 8192}
# Of the uses that a cache counts, the share that counts a pass later.
DECAYS = (0.8, 0.9, 0.97, 0.99)
# Shares of a layer's experts that are in memory.
SHARES = (0.125, 0.25, 0.5, 0.75)
Trace = list[list[list[int]]]


def main(arguments: list[str]) -> None:
    """Run, count, print."""
    flags = _parser().parse_args(arguments)
    config = config_of(flags.preset, flags.num_layers) | SMALL
    spec = spec_from_config(config, name="small")
    hardware = find_profile(flags.hardware)
    found: dict[str, Any] = {}
    experts = spec.layer(0).experts
    assert experts is not None
    for skew in flags.router_skew:
        first, second = (
            _drawn(experts.num_experts, experts.experts_per_token, skew, 4096, seed)
            for seed in (0, 1)
        )
        found[f"skew {skew:g}, independent"] = _compare(spec, first, second)
        for temperature in flags.temperature:
            say(f"skew {skew:g}, temperature {temperature:g}")
            first, second = (
                _trace(spec, hardware, skew, temperature, flags.num_prompts, flags.gen_len, seed)
                for seed in (0, 1)
            )
            found[f"skew {skew:g}, temperature {temperature:g}"] = _compare(spec, first, second)
    keep_result(
        flags,
        {
            "benchmark": "experts to keep in memory",
            "experts_loaded_a_pass_and_layer": found,
            **circumstances("expert_cache.py", arguments, "torch", "numpy"),
        },
    )


def _parser() -> BenchParser:
    parser = BenchParser("expert_cache.py", description=(__doc__ or "").strip(), example="")
    parser.add_model(default="qwen3-30b-a3b")
    add = parser.add_argument
    add("--hardware", default="cpu-2core", help="a recorded machine whose rates do not matter")
    add("--num-prompts", type=int, default=1, help="prompts that decode together (1)")
    add("--gen-len", type=int, default=512, help="tokens generated for each (512)")
    add("--router-skew", type=float, nargs="+", default=[0.0, 1.0], help="(0 1)")
    add("--temperature", type=float, nargs="+", default=[1.0, 0.0], help="of sampling (1 0)")
    return parser


def _trace(
    spec: ModelSpec,
    hardware: HardwareProfile,
    skew: float,
    temperature: float,
    num_prompts: int,
    gen_len: int,
    seed: int,
) -> Trace:
    """Return the experts that each pass of decode needs, by layer."""
    trace: dict[int, list[list[int]]] = {}

    def note(layer: int, routing: Routing) -> None:
        if len(routing.experts) == num_prompts:
            trace.setdefault(layer, []).append(routing.experts.unique().tolist())

    policy = Policy(
        model=spec,
        workload=Workload(prompt_len=8, gen_len=gen_len),
        gpu_batch_size=num_prompts,
        num_gpu_batches=1,
        prefill_batch_size=num_prompts,
        weights=placed_alike(spec, Placement(cpu=1)),
        cache=Placement(cpu=1),
        activations=Placement(cpu=1),
    )
    rng = np.random.default_rng(seed)
    prompts = rng.integers(spec.vocab_size, size=(num_prompts, 8)).tolist()
    source = DummyCheckpoint(spec=spec, router_skew=skew)
    sampler = Sampler(temperature=temperature, seed=seed)
    with (
        TemporaryDirectory() as folder,
        Runner(policy, hardware, source, Path(folder), sampler=sampler) as runner,
    ):
        vars(runner.block.routing_counts)["add"] = note
        for _ in runner.run(prompts):
            pass
    return [trace[layer] for layer in sorted(trace)]


def _compare(spec: ModelSpec, first: Trace, second: Trace) -> dict[str, dict[str, float]]:
    experts = spec.layer(0).experts
    assert experts is not None
    found = {}
    for share in SHARES:
        room = round(share * experts.num_experts)
        loads = Counter[str]()
        for before, passes in zip(first, second, strict=True):
            loads["by_frequency"] += _loaded(passes, _most_used(before, room))
            loads["by_this_run"] += _loaded(passes, _most_used(passes, room))
            loads["latest_used"] += _loaded_by_cache(passes, room, _most_used(before, room))
            for kept in DECAYS:
                count = _loaded_by_score(passes, room, _shares(before, experts.num_experts), kept)
                loads[f"recent_{kept:g}"] += count
        num_passes = sum(map(len, second))
        found[f"{share:g}"] = {name: round(n / num_passes, 3) for name, n in loads.items()}
    return found


def _most_used(passes: Sequence[Sequence[int]], room: int) -> list[int]:
    used = np.bincount([expert for needed in passes for expert in needed], minlength=room)
    order: list[int] = np.argsort(-used, kind="stable").tolist()
    return order[:room]


def _loaded(passes: Sequence[Sequence[int]], resident: Sequence[int]) -> int:
    here = set(resident)
    return sum(expert not in here for needed in passes for expert in needed)


def _shares(passes: Sequence[Sequence[int]], num_experts: int) -> list[float]:
    """Return the share of the passes that need each expert."""
    used = np.bincount([e for needed in passes for e in needed], minlength=num_experts)
    shares: list[float] = (used / len(passes)).tolist()
    return shares


def _loaded_by_score(
    passes: Sequence[Sequence[int]], room: int, shares: Sequence[float], kept: float
) -> int:
    """Count the loads of a cache that keeps the experts with the most uses, of which a pass later a
    share ``kept`` counts. It begins with the shares of an earlier run."""
    scores = np.array(shares)
    here = set(np.argsort(-scores, kind="stable")[:room].tolist())
    count = 0
    for needed in passes:
        scores *= kept
        scores[needed] += 1 - kept
        for expert in [e for e in needed if e not in here]:
            count += 1
            last = min(here, key=scores.__getitem__)
            if scores[last] < scores[expert]:
                here.remove(last)
                here.add(expert)
    return count


def _drawn(num_experts: int, per_token: int, skew: float, num_passes: int, seed: int) -> Trace:
    """Return choices that do not depend on each other, as the law has them."""
    rng = np.random.default_rng(seed)
    weights = np.log(chances(num_experts, per_token, skew))
    keys = weights + rng.gumbel(size=(num_passes, num_experts))
    return [np.argsort(-keys, axis=1)[:, :per_token].tolist()]


def _loaded_by_cache(passes: Sequence[Sequence[int]], room: int, resident: Sequence[int]) -> int:
    """Count the loads of a cache that begins with the experts that were used most before."""
    cache = OrderedDict.fromkeys(reversed(resident))
    count = 0
    for needed in passes:
        for expert in needed:
            count += expert not in cache
            cache[expert] = None
            cache.move_to_end(expert)
        # All that a pass needs are there at once.
        while len(cache) > max(room, len(needed)):
            cache.popitem(last=False)
    return count


if __name__ == "__main__":
    run(main)
