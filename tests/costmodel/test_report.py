"""The page of a policy: what its tables and bars say is what the model says."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from costmodel import search as search_command
from costmodel.cli.palette import BUFFER_COLORS, OTHER_BUFFERS, PHASE_COLORS, TIER_COLORS
from costmodel.optimizer.optimum import Search
from costmodel.optimizer.whatif import what_would_change
from costmodel.plan.policy import Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import PHASES, capacities
from costmodel.pricing.price import limits_by_phase, phase_channels
from costmodel.report import task_sample
from costmodel.report.buying import purchases_of_policy
from costmodel.report.page import write_policy_page
from costmodel.report.task_sample import simulate_sample
from costmodel.schedule.timeline import simulate
from profiles import InputError
from profiles.files import to_json
from profiles.units import GIB, MIB, format_bytes, format_figure, format_seconds
from tests.costmodel.machines import make_machine, make_mixture, make_policy
from tests.report_page import SECTIONS, Page, read_page

FLAGS = ("--hardware=rtx3090-pc", "--model=qwen2.5-0.5b", "--num-prompts=16", "--gen-len=8")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Policy, Path]:
    """The page of a search that leaves something on every tier."""
    folder = tmp_path_factory.mktemp("search")
    policy, page = folder / "policy.json", folder / "report.html"
    budgets = ("--gpu-memory=900MiB", "--cpu-memory=1100MiB")
    search_command.main([*FLAGS, *budgets, f"--output={policy}", f"--report={page}"])
    assert sorted(path.name for path in folder.iterdir()) == [policy.name, page.name]
    return read_page(page), Policy.load(policy), page


def test_a_page_has_every_section_and_needs_no_other_file(
    found: tuple[Page, Policy, Path],
) -> None:
    page, policy, path = found
    assert page.sections == SECTIONS
    assert page.links == [f"#{name}" for name in SECTIONS[:-1]]
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert json.loads(page.policy) == to_json(policy)
    assert policy.model.name in page.text


def test_bars_of_placement_are_the_policy_s_shares(found: tuple[Page, Policy, Path]) -> None:
    page, policy, _ = found
    placements = [*policy.weights.values(), policy.cache, policy.activations]
    tiers = {color: tier for tier, color in TIER_COLORS.items()}
    shares = {(row, tier): 0.0 for row in range(len(placements)) for tier in TIER_COLORS}
    for bar in page.bars("placement-1"):
        shares[round(bar["row"]), tiers[bar["color"]]] = bar["right"] - bar["left"]
    for row, placement in enumerate(placements):
        for tier in TIER_COLORS:
            assert shares[row, tier] == pytest.approx(getattr(placement, tier), abs=1e-9)
    assert len(page.tables["placement"]) == len(placements)


def test_bars_and_table_of_memory_end_at_the_peaks(found: tuple[Page, Policy, Path]) -> None:
    page, policy, _ = found
    assert policy.hardware is not None and policy.predicted is not None
    budgets, peaks = capacities(policy.hardware), policy.predicted.peak_bytes
    ends = dict.fromkeys(range(len(budgets)), 0.0)
    for bar in page.bars("memory-1"):
        assert bar["color"] in BUFFER_COLORS.values()
        ends[round(bar["row"])] = max(ends[round(bar["row"])], bar["right"])
    assert [*ends.values()] == pytest.approx([peaks[t] / budgets[t] for t in budgets], rel=1e-6)
    table = page.tables["memory"]
    assert table["predicted peak"] == [format_bytes(peaks[tier]) for tier in budgets]
    assert table["budget"] == [format_bytes(budgets[tier]) for tier in budgets]
    assert OTHER_BUFFERS not in table and "weights" in table


def test_phases_and_limits_are_the_prediction_s(found: tuple[Page, Policy, Path]) -> None:
    page, policy, _ = found
    predicted = policy.predicted
    assert policy.hardware is not None and predicted is not None
    assert page.tables["phases"] == {
        "prefill": [format_seconds(predicted.prefill_s)],
        "decode": [format_seconds(predicted.decode_s)],
        "token/s": [format_figure(predicted.throughput_tok_per_s)],
    }
    colors = {phase: PHASE_COLORS[phase] for phase in PHASES}
    busy = dict.fromkeys(colors.values(), 0.0)
    for bar in page.bars("limits-1"):
        busy[bar["color"]] += bar["right"] - bar["left"]
    channels = phase_channels(policy, policy.hardware)
    for phase, color in colors.items():
        assert busy[color] == pytest.approx(sum(channels[phase].values()))
    limits = limits_by_phase(policy, policy.hardware)
    assert list(limits) == ["prefill", "decode"]
    for phase, name in limits.items():
        assert any(
            line.startswith(f"By prediction, {name}") and line.endswith(f"limits {phase}.")
            for line in page.text.splitlines()
        )


def test_what_to_buy_is_the_explanation_s(found: tuple[Page, Policy, Path]) -> None:
    page, policy, _ = found
    assert policy.hardware is not None
    at_hand = Search(policy.hardware, policy.model, policy.workload)
    result = at_hand.run()
    changes = what_would_change(at_hand, result)
    rows = page.tables["buying"]
    assert set(rows) == {"this machine", *(change.what for change in changes)}
    for change in changes:
        assert rows[change.what][0] == f"{format_figure(change.job_tok_per_s, 4)} token/s"
    asked = purchases_of_policy(policy, policy.hardware)
    assert (asked.job_tok_per_s, asked.changes) == (result.job_tok_per_s, changes)


def test_the_timeline_is_the_simulation_s(found: tuple[Page, Policy, Path]) -> None:
    page, policy, _ = found
    assert policy.hardware is not None
    tasks = simulate(policy, policy.hardware, num_passes=4).tasks
    for phase, is_prefill in (("timeline-1", True), ("timeline-2", False)):
        expected = [timed for timed in tasks if timed.task.is_prefill == is_prefill]
        bars = page.bars(phase)
        assert len(bars) >= 100
        zero_s = min(timed.start_s for timed in expected)
        for bar, timed in islice(zip(bars, expected, strict=False), 100):
            task = timed.task
            assert bar["left"] == pytest.approx(timed.start_s - zero_s, abs=1e-9)
            assert bar["right"] == pytest.approx(timed.end_s - zero_s, abs=1e-9)
            place = f"pass {task.token}, layer {task.layer}, batch {task.batch}"
            assert bar["text"].splitlines()[:2] == [
                f"{task.kind.replace('_', ' ')} (simulated)",
                place,
            ]


def test_a_sample_holds_the_first_tasks_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = Placement(gpu=0.3, cpu=0.3, disk=0.4)
    policy = make_policy(weights=spread, cache=spread, activations=spread, cpu_attention=0.5)
    hardware = make_machine(gpu_memory=GIB)
    everything = simulate(policy, hardware).tasks
    whole = simulate_sample(policy, hardware)
    counts = {True: 0, False: 0}
    for timed in everything:
        counts[timed.task.is_prefill] += 1
    assert len(whole.phases["prefill"]) == counts[True]
    assert len(whole.phases["decode"]) == counts[False]
    assert not any(whole.is_cut.values())
    # A run that made two passes had loaded for the third.
    short = simulate_sample(policy, hardware, num_passes=2)
    assert {task.token for task in short.phases["decode"]} == {1}
    monkeypatch.setattr(task_sample, "MOST_LAYER_BATCHES", 1)
    assert simulate_sample(policy, hardware).phases["decode"] == []
    monkeypatch.setattr(task_sample, "MAX_LAYER_BATCHES", 1)
    assert simulate_sample(policy, hardware).phases["prefill"] == []


def test_names_are_text_and_what_no_search_finds_is_told(tmp_path: Path) -> None:
    mixture = make_mixture()
    work = Workload(prompt_len=16, gen_len=5, num_prompts=8)
    policy = make_policy(model=replace(mixture, name="<b>mixture</b>"), workload=work)
    # Less than any policy needs: the page shows by how much this one is over.
    hardware = make_machine(disk=0, cpu_memory=MIB // 16)
    write_policy_page(tmp_path / "page.html", policy, hardware)
    page = read_page(tmp_path / "page.html")
    assert page.sections == SECTIONS
    assert "<b>mixture</b> on by hand" in page.text
    assert "experts" in page.tables["placement"]
    assert page.headers["memory"][1:] == ["CPU", "disk"]
    assert "buying" not in page.tables and "The search found no policy:" in page.text


@pytest.mark.parametrize("path", ["missing/report.html", "policy.json"])
def test_a_report_that_cannot_be_written_is_refused_first(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--report"):
        search_command.main([*FLAGS, "--output=policy.json", f"--report={path}"])
    assert [*tmp_path.iterdir()] == []
