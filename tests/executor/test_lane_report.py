"""The report of a run over lanes against its own spans, and against a simulation of its passes."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from costmodel.calibration.factors import errors_of
from costmodel.calibration.measured_runs import read_runs
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.report import page as report_page
from costmodel.report.buying import Purchases
from costmodel.schedule.job_simulation import simulate_job
from costmodel.schedule.pass_counts import cached_tokens
from executor import machine_profile
from executor import report as report_command
from executor.checkpoint.dummy import DummyCheckpoint
from executor.cli.lane_figures import LaneFigures
from executor.cli.run_command import Job
from executor.cli.run_report import Report, format_report
from executor.model.sampling import Sampler
from executor.run.lanes import LaneRequest
from executor.run.results import BlockResult
from executor.run.runner import Runner
from profiles.units import format_figure, format_seconds
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy
from tests.plain_models import plain_model
from tests.report_page import SECTIONS, read_page

SPEC = plain_model(num_kv_heads=2)
HARDWARE = make_hardware()
LONGEST, GEN_LEN, NUM_PROMPTS = 40, 12, 14
LANES = LanePolicy(pool_tokens=192, pass_rows=64, chunk_rows=32)
HALVES = Placement(cpu=0.5, disk=0.5)

Json = dict[str, Any]


def lane_policy() -> Policy:
    """Return two batches of two lanes, half of the weights on disk."""
    policy = make_policy(
        SPEC, prompt_len=LONGEST, gen_len=GEN_LEN, num_prompts=NUM_PROMPTS, weights=HALVES
    )
    return replace(policy, lanes=LANES, hardware=HARDWARE)


def draw_prompts() -> list[list[int]]:
    """Return prompts of 1 to 40 tokens, one of them of 40."""
    rng = random.Random(5)
    lengths = [LONGEST, *(rng.randint(1, LONGEST) for _ in range(NUM_PROMPTS - 1))]
    return [[rng.randrange(SPEC.vocab_size) for _ in range(n)] for n in lengths]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run whose answers end at many tokens, and the files that it left."""

    report: Report
    results: list[BlockResult]
    lanes: LaneFigures
    trace: Path
    page: Path

    @property
    def events(self) -> list[Json]:
        """The events of the timeline."""
        found: list[Json] = json.loads(self.trace.read_text())["traceEvents"]
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    job = Job(
        policy=lane_policy(),
        hardware=HARDWARE,
        source=DummyCheckpoint(spec=SPEC),
        prompts=draw_prompts(),
        sampler=Sampler(temperature=1.0, seed=1),
        eos_ids=frozenset(range(SPEC.vocab_size // 8)),
    )
    trace, page = folder / "trace.json", folder / "page.html"
    with (
        pytest.MonkeyPatch.context() as patch,
        job.recording(trace, page) as recorder,
    ):
        # What to buy takes a search.
        patch.setattr(report_page, "purchases_of_policy", lambda *_: Purchases(problem="none"))
        results: list[BlockResult] = []
        report = job.run(folder, planned=job.predict(), recorder=recorder, on_block=results.append)
    # The page is written behind the block.
    assert report.lanes is not None
    return Run(report=report, results=results, lanes=report.lanes, trace=trace, page=page)


def test_every_token_is_counted_once(run: Run) -> None:
    lanes, log = run.lanes, run.lanes.log
    generated: dict[int, int] = {}
    for block in run.results:
        stopped = block.stopped
        generated |= {i: len(ids) + (i in stopped) for i, ids in block.output_ids.items()}
    assert lanes.answers.tolist() == [generated[i] for i in range(NUM_PROMPTS)]
    assert len(set(generated.values())) > 3
    # A lane makes a token in each of its passes.
    assert sum(log.decoding) + sum(log.newcomers) == sum(generated.values())
    assert sum(log.newcomers) == NUM_PROMPTS
    assert lanes.num_passes == sum(block.num_tokens for block in run.results)
    told = lanes.as_json()
    assert told["prompt_tokens"] == sum(map(len, draw_prompts()))
    assert told["output_tokens"] == sum(generated.values())
    assert told["expected_output_tokens"] == GEN_LEN * NUM_PROMPTS


def test_passes_are_those_of_the_simulation(run: Run) -> None:
    log, job = run.lanes.log, run.lanes.predicted
    assert list(log.decoding) == job.counts.decoding.tolist()
    assert list(log.newcomers) == job.counts.newcomers.tolist()
    assert list(log.waiting) == job.trace.waiting.tolist()
    assert list(log.tokens) == cached_tokens(job.trace, run.lanes.lengths).tolist()
    pages = max(job.trace.most_pages) / (LANES.pool_tokens // 32)
    assert run.lanes.pool_share[0] == pytest.approx(pages)


def test_seconds_are_those_of_the_spans(run: Run) -> None:
    (pid,) = (e["pid"] for e in run.events if e["args"].get("name") == "measured")
    names = {
        e["tid"]: e["args"]["name"]
        for e in run.events
        if e["name"] == "thread_name" and e["pid"] == pid
    }
    tasks = [e for e in run.events if e["ph"] == "X" and e["pid"] == pid]
    busy: dict[str, float] = defaultdict(float)
    for task in tasks:
        assert task["cat"] == "run"
        busy[names[task["tid"]]] += task["dur"] / 1e6
    # The last passes load weights that no pass needs any more.
    assert dict(busy) == pytest.approx(run.report.phase_busy_s["run"], rel=1e-6)
    computed = [task for task in tasks if names[task["tid"]] == "cpu_compute"]
    took = max(t["ts"] + t["dur"] for t in computed) - min(t["ts"] for t in computed)
    seconds = run.report.phase_s["run"]
    assert took / 1e6 <= seconds
    tokens = int(run.lanes.answers.sum())
    assert run.report.measured_tok_per_s == pytest.approx(tokens / seconds)
    assert run.report.as_json()["run_s"] == seconds


def test_a_timeline_has_the_passes_measured_and_simulated(run: Run) -> None:
    for label, seconds in (
        ("passes, measured", np.array(run.lanes.log.end_s) - np.array(run.lanes.log.start_s)),
        ("passes, simulated", run.lanes.predicted.seconds),
    ):
        (pid,) = (e["pid"] for e in run.events if e["args"].get("name") == label)
        bars = [e for e in run.events if e["ph"] == "X" and e["pid"] == pid]
        assert [bar["name"] for bar in bars] == [f"pass {i}" for i in range(len(seconds))]
        assert [bar["dur"] / 1e6 for bar in bars] == pytest.approx(seconds.tolist())
        at_work = [bar["args"]["lanes"] for bar in bars]
        assert sum(at_work) == run.lanes.num_tokens


def test_the_report_is_one_for_people(run: Run) -> None:
    text = format_report(run.report)
    rate = format_figure(run.lanes.predicted.throughput_tok_per_s)
    assert f"{rate} token/s" in text
    assert format_seconds(run.lanes.log.run_s) in text
    assert f"{run.lanes.num_tokens} out" in text
    assert "prefill" not in text and "decode" not in text
    assert "against known ones" in text


def test_a_page_shows_the_passes_and_its_file_holds_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = read_page(run.page)
    place = SECTIONS.index("timeline")
    assert page.sections == [*SECTIONS[:place], "passes", *SECTIONS[place:]]
    assert page.tables["phases"]["run"][1] == format_seconds(run.report.phase_s["run"])
    busy = run.report.phase_busy_s["run"]["cpu_compute"]
    assert page.tables["limits"]["cpu_compute, run"][1] == format_seconds(busy)
    text = json.dumps([page.pictures[f"passes-{i}"] for i in (1, 2, 3)])
    assert text.count("(measured)") == text.count("(simulated)") == 3 * run.lanes.num_passes
    assert "tokens in the cache" in text and "lanes at work" in text
    monkeypatch.setattr(report_page, "purchases_of_policy", lambda *_: Purchases(problem="none"))
    again = tmp_path / "again.html"
    report_command.main([str(run.trace), f"--output={again}"])
    found = read_page(again)
    assert found.sections == page.sections
    assert found.tables["phases"] == page.tables["phases"]
    assert found.tables["limits"] == page.tables["limits"]


def test_a_wrong_guess_is_told_with_what_it_costs(tmp_path: Path) -> None:
    """Answers of 12 tokens are guessed to have one, so that too many lanes begin for the cache."""
    policy = change_policy(lane_policy(), lanes=replace(LANES, pool_tokens=128))
    requests = [
        LaneRequest(prompt_ids=[7] * 29, max_tokens=GEN_LEN, expected_tokens=1) for _ in range(8)
    ]
    with Runner(policy, HARDWARE, DummyCheckpoint(spec=SPEC), tmp_path) as runner:
        results = list(runner.run_requests(requests))
    lanes = LaneFigures(policy=policy, hardware=HARDWARE, log=runner.passes)
    assert sum(len(result.output_ids) for result in results) == 8
    waiting = np.array(lanes.log.waiting)
    assert lanes.num_waited == waiting.sum() == lanes.predicted.trace.waited > 0
    tokens = cached_tokens(lanes.predicted.trace, lanes.lengths)
    assert list(lanes.log.tokens) == tokens.tolist()
    seconds = np.array(lanes.log.end_s) - np.array(lanes.log.start_s)
    at_work = np.array(lanes.log.decoding) + np.array(lanes.log.newcomers)
    assert lanes.waited_s == pytest.approx((seconds * waiting / (waiting + at_work)).sum())
    known = simulate_job(policy, HARDWARE, lanes.lengths.expecting([GEN_LEN] * 8))
    real = simulate_job(policy, HARDWARE, lanes.lengths, answers=np.full(8, GEN_LEN))
    assert lanes.guess_cost_s == pytest.approx(real.total_s - known.total_s)
    assert lanes.guess_cost_s != 0
    told = "\n".join(lanes.lines())
    assert f"waited for room in the cache {lanes.num_waited} times" in told
    assert "8 out were expected" in told


def test_a_run_is_kept_for_calibration(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_profile, "SHORTEST_S", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine_profile.keep_run(run.report, tmp_path)
    (path,) = (tmp_path / "cache" / "zigzag").glob("runs-*.csv")
    (kept,) = read_runs(path)
    assert kept.lengths is not None and kept.policy.lanes == LANES
    assert kept.lengths.num_tokens == run.lanes.num_tokens
    assert kept.throughput_tok_per_s == pytest.approx(run.report.measured_tok_per_s)
    # With few requests, a sketch is the job itself.
    predicted = run.lanes.predicted.throughput_tok_per_s / run.report.measured_tok_per_s - 1
    assert errors_of(HARDWARE, [kept]) == pytest.approx([predicted])
