"""The timeline of a run: every task once, measured beside simulated, never kept in memory."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from contextlib import chdir
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.layout import model_layers
from costmodel.plan.plan import Plan
from costmodel.plan.policy import Placement, Policy
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import ZigzagSchedule
from executor.checkpoint.dummy import DummyCheckpoint
from executor.cli.run_command import Job
from executor.cli.run_report import Report
from executor.engine.channels import Channel, Engine
from executor.engine.trace import Span, Trace
from executor.model.sampling import Sampler
from executor.run import recorder
from profiles.errors import InputError
from profiles.hardware import CHANNELS
from profiles.outputs import OutputError
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy
from tests.plain_models import plain_model

PROMPT_LEN, GEN_LEN, NUM_PROMPTS = 6, 4, 8
SPEC = plain_model(num_kv_heads=2)
HARDWARE = make_hardware(gpu=True)
SPREAD = Placement(gpu=0.3, cpu=0.3, disk=0.4)
MEASURED, SIMULATED = "measured", "simulated"

Json = dict[str, Any]


def traced_policy() -> Policy:
    """Return a policy that uses every channel, for two blocks of two batches."""
    policy = make_policy(SPEC, prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=NUM_PROMPTS)
    return change_policy(
        policy, weights=SPREAD, cache=SPREAD, activations=SPREAD, cpu_attention=0.5
    )


def run_traced(folder: Path, *, eos_ids: frozenset[int] = frozenset()) -> tuple[Report, Json]:
    """Run a job and read its timeline."""
    job = Job(
        policy=traced_policy(),
        hardware=HARDWARE,
        source=DummyCheckpoint(spec=SPEC),
        prompts=[[3 + i] * PROMPT_LEN for i in range(NUM_PROMPTS)],
        sampler=Sampler(),
        eos_ids=eos_ids,
    )
    path = folder / "trace.json"
    with job.recording(path) as recorder:
        report = job.run(folder, planned=job.predict(), recorder=recorder)
    trace: Json = json.loads(path.read_text(encoding="utf-8"))
    return report, trace


def slices_of(trace: Json, label: str) -> dict[str, list[Json]]:
    """Return the tasks of a timeline on each channel, in the order of the file."""
    events = trace["traceEvents"]
    (pid,) = (
        e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == label
    )
    mine = [e for e in events if e["pid"] == pid]
    names = {e["tid"]: e["args"]["name"] for e in mine if e["name"] == "thread_name"}
    slices = defaultdict(list)
    for event in mine:
        if event["ph"] == "X":
            slices[names[event["tid"]]].append(event)
    return slices


def identify(event: Json) -> tuple[Any, ...]:
    args = event["args"]
    return event["name"], event["cat"], args["token"], args["layer"], args["batch"]


def scheduled() -> dict[str, list[tuple[Any, ...]]]:
    """Return what both timelines must hold: the tasks of the job's schedule on each channel."""
    plan = Plan.of(traced_policy(), has_gpu=True)
    tasks = defaultdict(list)
    for _ in range(2):
        for task in ZigzagSchedule(plan, num_batches=2, num_tokens=GEN_LEN):
            phase = "decode" if task.token else "prefill"
            name = f"{task.kind} {task.layer}"
            tasks[task.channel].append((name, phase, task.token, task.layer, task.batch))
    return tasks


def test_every_task_is_there_measured_and_simulated(tmp_path: Path) -> None:
    _, trace = run_traced(tmp_path)
    expected = scheduled()
    assert set(expected) == set(CHANNELS)
    for label in (MEASURED, SIMULATED):
        slices = slices_of(trace, label)
        assert set(slices) == set(expected)
        for channel, events in slices.items():
            assert [identify(event) for event in events] == expected[channel], (label, channel)
            # A channel does one thing at a time.
            for before, after in pairwise(events):
                assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
    assert trace["otherData"]["notes"] == ""


def test_spans_tell_bytes_and_rates_that_add_up(tmp_path: Path) -> None:
    report, trace = run_traced(tmp_path)
    figures = report.as_json()
    for channel, events in slices_of(trace, MEASURED).items():
        moved = sum(event["args"].get("bytes", 0) for event in events)
        assert moved == figures["moved_bytes"][channel]
        busy_us = sum(event["dur"] for event in events)
        assert busy_us == pytest.approx(figures["busy_s"][channel] * 1e6)
        blocked_s = sum(event["args"]["blocked_s"] for event in events)
        assert blocked_s == pytest.approx(figures["blocked_s"][channel])
        for event in events:
            if "bytes" in event["args"]:
                # GB/s are thousands of bytes per microsecond.
                rate = event["args"]["bytes"] / event["dur"] / 1e3
                assert event["args"]["gb_per_s"] == pytest.approx(rate, rel=1e-3)


def test_every_block_is_simulated_from_its_own_start(tmp_path: Path) -> None:
    report, trace = run_traced(tmp_path)
    simulated = slices_of(trace, SIMULATED)
    firsts = []
    for events in simulated.values():
        half = len(events) // 2
        firsts.append((events[0]["ts"], events[half]["ts"]))
    first, second = min(ts for ts, _ in firsts), min(ts for _, ts in firsts)
    apart_us = (report.blocks[1].start_s - report.blocks[0].start_s) * 1e6
    assert second - first == pytest.approx(apart_us)
    # The zero is shared: nothing measured in a block begins before its simulation does.
    measured = slices_of(trace, MEASURED)
    assert 0 <= first <= min(events[0]["ts"] for events in measured.values())
    assert second <= min(events[len(events) // 2]["ts"] for events in measured.values())


def test_a_run_that_ends_early_is_simulated_as_far(tmp_path: Path) -> None:
    everything = frozenset(range(SPEC.vocab_size))
    report, trace = run_traced(tmp_path, eos_ids=everything)
    assert [block.num_tokens for block in report.blocks] == [1, 1]
    computed = slices_of(trace, SIMULATED)["gpu_compute"]
    assert {event["args"]["token"] for event in computed} == {0}
    assert len(computed) == len(slices_of(trace, MEASURED)["gpu_compute"])


def test_a_long_run_is_cut_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    per_token = len(model_layers(SPEC)) * 2
    # A block and a half.
    monkeypatch.setattr(recorder, "MAX_TRACED_LAYERS", per_token * (GEN_LEN + 2))
    with caplog.at_level(logging.WARNING):
        _, trace = run_traced(tmp_path)
    expected = {
        channel: tasks[: len(tasks) // 2] + [t for t in tasks[len(tasks) // 2 :] if t[2] < 2]
        for channel, tasks in scheduled().items()
    }
    for label in (MEASURED, SIMULATED):
        found = {name: [*map(identify, events)] for name, events in slices_of(trace, label).items()}
        assert found == expected
    note = "holds the first 6 of 8 passes over the model"
    assert trace["otherData"]["notes"] == note
    assert note in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_ended_a_run_outlives_a_trace_that_fails(
    error: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path("/dev/full")
    with (
        chdir(tmp_path),
        pytest.raises(error),
        recorder.open_recorder(full, [traced_policy()], HARDWARE) as opened,
    ):
        opened.is_complete = True
        raise error
    (rescue,) = tmp_path.iterdir()
    assert "write of /dev/full" in caplog.text and rescue.name in caplog.text
    assert json.loads(rescue.read_text())["traceEvents"]
    with (
        chdir(tmp_path),
        pytest.raises(OutputError, match="write of /dev/full"),
        recorder.open_recorder(full, [traced_policy()], HARDWARE) as opened,
    ):
        opened.is_complete = True


def test_a_block_too_large_for_a_file_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MAX_TRACED_LAYERS", 3)
    with pytest.raises(InputError, match=r"--trace: got .* at most 3"):
        run_traced(tmp_path)
    assert list(tmp_path.iterdir()) == []


@dataclass
class FakeStream:
    """A stream whose work takes the seconds that are added to its clock."""

    clock_ms: float = 0.0

    def synchronize(self) -> None:
        """Nothing is ever under way."""


@dataclass
class FakeEvent:
    """An event of a fake stream that has passed once it is let."""

    passed: list[bool]
    at_ms: float = field(default=-1.0)

    def record(self, stream: FakeStream) -> None:
        self.at_ms = stream.clock_ms

    def query(self) -> bool:
        return self.passed[0]

    def synchronize(self) -> None:
        self.passed[0] = True

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at_ms - self.at_ms


def test_cuda_tasks_are_timed_by_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers return at once, so only the events know how long the work took."""
    passed, stream = [True], FakeStream()

    def make_event(*, enable_timing: bool, blocking: bool) -> FakeEvent:
        assert enable_timing and blocking
        return FakeEvent(passed)

    def work(task: Task) -> int:
        passed[0] = False
        stream.clock_ms += 100.0 * (task.index + 1)
        return task.index

    monkeypatch.setattr(torch.cuda, "Event", make_event)
    spans: list[Span] = []
    channel = Channel("h2d", stream=stream)  # type: ignore[arg-type]  # a fake
    trace = Trace([spans.append])
    with Engine([channel], {"send": work}, trace) as engine:
        for index in range(3):
            engine.submit(make_task(index))
        engine.drain()
    assert [span.task.index for span in spans] == [0, 1, 2]
    assert [span.num_bytes for span in spans] == [0, 1, 2]
    seconds = [span.end_s - span.start_s for span in spans]
    assert seconds == pytest.approx([0.1, 0.2, 0.3])
    for before, after in pairwise(spans):
        assert after.start_s == pytest.approx(before.end_s)
    assert trace.busy_s["prefill"]["h2d"] == pytest.approx(0.6)


def make_task(index: int) -> Task:
    return Task(
        index=index,
        kind="send",
        channel="h2d",
        token=0,
        layer=0,
        batch=0,
        slot=0,
        hidden_slot=0,
        read_slot=0,
        sent_slot=0,
        waits=(),
    )
