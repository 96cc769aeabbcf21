"""What the results of tests/bench/gpu.py say of the goals for a real GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_cases import GpuCase

# Times the throughput of the best peer: of FlexGen in 16 and in 4 bits, and of a mixture's peer.
FLEXGEN_SPEEDUPS = {16: 3.0, 4: 5.0}
MIXTURE_SPEEDUP = 2.0
GOOD_ATTAINMENT, GOOD_ATTAINMENTS, LEAST_ATTAINMENT = 0.85, 3, 0.75
PREDICTION_ERROR, GOOD_PREDICTIONS = 0.15, 4
# Share of a predicted peak by which the measured one may be higher.
PEAK_ERROR = 0.01

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal: whether it holds (``None`` where too little was measured), and its figures."""

    text: str
    holds: bool | None
    figures: Mapping[str, Any]


def goals_of(results: Mapping[str, Result], cases: Mapping[str, GpuCase]) -> list[Goal]:
    """Judge the results of steps, by name."""
    good = {name: result for name, result in results.items() if "error" not in result}
    ours = {name: result for name, result in good.items() if "ours" in result}
    main = [name for name, case in cases.items() if case.is_main]
    judged = {name: ours[name]["ours"] for name in main if name in ours}
    is_all = len(judged) == len(main)
    return [
        _tests(results),
        _speedups(good, cases),
        _attainment(judged, is_all),
        _prediction(judged, ours, is_all),
        _profile(good, ours),
    ]


def speedups_of(results: Mapping[str, Result], name: str) -> dict[str, float]:
    """Return how many times as fast as each peer a case ran, by the peer's name."""
    measured = results[name]["ours"]["measured_tok_per_s"]
    return {
        step.rpartition(": ")[2]: measured / result["tok_per_s"]
        for step, result in results.items()
        if step.startswith(f"{name}: ") and "tok_per_s" in result
    }


def table_of(results: Mapping[str, Result]) -> str:
    """Return the cases as a table in Markdown."""
    good = {name: result for name, result in results.items() if "error" not in result}
    lines = [
        "| case | GPU memory | prompts | token/s | predicted | attainment | times the peers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in good.items():
        if "ours" not in result:
            continue
        run, gib = result["ours"], result["settings"]["gpu_memory"] / 2**30
        times = ", ".join(f"{peer} {x:.2f}" for peer, x in speedups_of(good, name).items())
        figures = f"{run['measured_tok_per_s']:.4g} | {run['predicted_tok_per_s']:.4g}"
        lines.append(
            f"| {name} | {gib:g} GiB | {run['num_prompts']} | {figures}"
            f" | {run['attainment']:.2f} | {times} |"
        )
    return "\n".join(lines)


def _tests(results: Mapping[str, Result]) -> Goal:
    found = results.get("tests", {})
    counts = found.get("counts", {})
    holds = None
    if counts:
        # Without a GPU, those that need one are skipped.
        holds = "error" not in found and bool(counts.get("passed")) and not counts.get("skipped")
    torch = found.get("versions", {}).get("torch")
    return Goal(text="1. tests for a GPU pass", holds=holds, figures={**counts, "torch": torch})


def _speedups(good: Mapping[str, Result], cases: Mapping[str, GpuCase]) -> Goal:
    figures: dict[str, float | None] = {}
    least: dict[str, float] = {}
    for name, case in cases.items():
        peers = {"flexgen": FLEXGEN_SPEEDUPS[case.weight_bits]} if case.flexgen else {}
        if case.is_mixture and case.accelerate_batches:
            peers["accelerate"] = MIXTURE_SPEEDUP
        times = speedups_of(good, name) if name in good else {}
        figures |= {f"{name}: {peer}": times.get(peer) for peer in peers}
        least |= {f"{name}: {peer}": factor for peer, factor in peers.items()}
    found = {key: times for key, times in figures.items() if times is not None}
    holds = None if len(found) < len(figures) else True
    if any(times < least[key] for key, times in found.items()):
        holds = False
    text = "2. 3 times FlexGen in 16 bits, 5 in 4, a mixture 2 times its peer"
    return Goal(text=text, holds=holds, figures=figures)


def _attainment(judged: Mapping[str, Result], is_all: bool) -> Goal:
    found = {name: run["attainment"] for name, run in judged.items()}
    enough = sum(share >= GOOD_ATTAINMENT for share in found.values()) >= GOOD_ATTAINMENTS
    holds = enough and min(found.values()) >= LEAST_ATTAINMENT
    text = "3. attainment 0.85 in three of five cases, none under 0.75"
    return Goal(text=text, holds=holds if is_all else None, figures=found)


def _prediction(judged: Mapping[str, Result], ours: Mapping[str, Result], is_all: bool) -> Goal:
    errors = {
        name: run["predicted_tok_per_s"] / run["measured_tok_per_s"] - 1
        for name, run in judged.items()
    }
    # Of all cases and tiers, the peak that is furthest above its prediction.
    over = {
        f"{name}: peak {tier}": used / result["ours"]["predicted_peak_bytes"][tier] - 1
        for name, result in ours.items()
        for tier, used in result["ours"]["peak_bytes"].items()
        if result["ours"]["predicted_peak_bytes"].get(tier)
    }
    worst = max(over, key=over.__getitem__, default=None)
    figures = errors | ({worst: over[worst]} if worst else {})
    exact = sum(abs(error) <= PREDICTION_ERROR for error in errors.values()) >= GOOD_PREDICTIONS
    holds = exact and worst is not None and over[worst] <= PEAK_ERROR
    text = "4. predictions within 15 % in four of five, peaks at most 1 % above theirs"
    return Goal(text=text, holds=holds if is_all else None, figures=figures)


def _profile(good: Mapping[str, Result], ours: Mapping[str, Result]) -> Goal:
    text = "5. a full profile of this machine, for all cases"
    if "profile" not in good:
        return Goal(text=text, holds=None, figures={})
    found = good["profile"]
    profile, boot = found["profile"], found["boot"]
    elsewhere = [name for name, result in ours.items() if result["boot"] != boot]
    is_full = "--quick" not in profile["source"]
    figures = {key: profile[key] for key in ("name", "date", "source")}
    return Goal(
        text=text,
        holds=is_full and not elsewhere,
        figures=figures | {"cases of another machine": elsewhere},
    )
