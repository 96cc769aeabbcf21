"""The timeline of several nodes: clocks that differ, and nodes that have gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from costmodel.schedule.tasks import Task
from executor.engine.trace import Span, SpanLog
from executor.nodes import cluster_trace
from executor.nodes.cluster_trace import ClusterTrace, clock_of
from profiles.errors import RunError

AHEAD_S = {"a": 1000.0, "b": -250.0}
TICK_S = 1e-3


class Ticks:
    """This machine's clock, which goes on by a tick with each look at it."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += TICK_S
        return self.now_s


TICKS = Ticks()


def _span(start_s: float, layer: int) -> Span:
    task = Task(
        index=0,
        kind="compute",
        channel="cpu_compute",
        token=0,
        layer=layer,
        batch=0,
        slot=0,
        hidden_slot=0,
        read_slot=0,
        sent_slot=0,
        waits=(),
    )
    return Span(task=task, start_s=start_s, end_s=start_s + 0.5, num_bytes=7)


class Call:
    """A call that has returned, or is late; each is another key."""

    def __init__(self, value: Any, *, is_late: bool = False) -> None:
        self.value, self.is_late = value, is_late


class FakeActor:
    """A node whose clock is ahead of this machine's."""

    def __init__(self, name: str) -> None:
        self.name, self._ahead_s = name, AHEAD_S[name]
        self.noted: list[Span] = []
        self.is_gone = self.is_late = False
        # Seconds until the node's time is here, call by call; then none.
        self.delays_s: Iterator[float] = iter(())

    @property
    def handle(self) -> Any:
        """What the trace calls."""
        return SimpleNamespace(
            clock=SimpleNamespace(remote=self._clock),
            spans=SimpleNamespace(remote=lambda: Call(self.noted, is_late=self.is_late)),
        )

    def _clock(self) -> Call:
        told_s = TICKS() + self._ahead_s
        TICKS.now_s += next(self.delays_s, 0.0)
        return Call(told_s)

    def run(self, layer: int) -> float:
        """Note a task now; returns the time here."""
        now_s = TICKS()
        self.noted.append(_span(now_s + self._ahead_s, layer))
        return now_s


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls return their results at once, and time go on by ticks."""

    def ask(actor: FakeActor, call: Call) -> Any:
        if actor.is_gone:
            raise RunError(f"node {actor.name}: gone")
        return call.value

    def wait(calls: list[Call], *, num_returns: int, timeout: float) -> tuple[list[Call], ...]:
        return [call for call in calls if not call.is_late], [c for c in calls if c.is_late]

    monkeypatch.setattr(cluster_trace, "load_ray", lambda: SimpleNamespace(wait=wait))
    monkeypatch.setattr(cluster_trace, "ask", ask)
    monkeypatch.setattr(cluster_trace, "time", SimpleNamespace(perf_counter=TICKS))


def _events(path: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Return the tasks of each node, and the notes."""
    told = json.loads(path.read_text())
    events = told["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            found[names[event["pid"]]].append(event)
    return found, told["otherData"]["notes"]


def test_tasks_of_all_nodes_are_on_one_clock(tmp_path: Path) -> None:
    nodes = [FakeActor(name) for name in AHEAD_S]
    trace = ClusterTrace(tmp_path / "trace.json", len(nodes))
    trace.begin(nodes)  # type: ignore[arg-type]  # what looks like actors
    begun_s = TICKS.now_s
    order = [(node, layer) for layer in range(3) for node in nodes]
    times_s = [node.run(layer) for node, layer in order]
    trace.take(nodes)  # type: ignore[arg-type]
    trace.write()
    found, notes = _events(tmp_path / "trace.json")
    assert "clocks agree within" in notes
    told = sorted(
        (event["ts"] * 1e-6, name, event["args"]["layer"])
        for name, events in found.items()
        for event in events
    )
    assert [(name, layer) for _, name, layer in told] == [(node.name, i) for node, i in order]
    for (told_s, _, _), at_s in zip(told, times_s, strict=True):
        assert told_s == pytest.approx(at_s - begun_s, abs=1e-9)
    assert all(e["dur"] == pytest.approx(5e5) for e in found["a"])


def test_the_shortest_call_tells_the_time() -> None:
    actor = FakeActor("a")
    actor.delays_s = iter((0.5, 0.0, 0.3, *[0.2] * 5))
    clock = clock_of(actor)  # type: ignore[arg-type]
    assert clock.ahead_s == pytest.approx(AHEAD_S["a"], abs=1e-9)
    # A look at the node's clock, and one at this machine's.
    assert clock.error_s == pytest.approx(TICK_S)


@pytest.mark.parametrize(
    ("state", "told"), [("is_gone", "gone"), ("is_late", "no answer within 30 s")]
)
def test_a_node_that_does_not_answer_has_no_track(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, state: str, told: str
) -> None:
    nodes = [FakeActor(name) for name in AHEAD_S]
    trace = ClusterTrace(tmp_path / "trace.json", len(nodes))
    trace.begin(nodes)  # type: ignore[arg-type]
    nodes[0].run(0)
    setattr(nodes[1], state, True)
    trace.take(nodes)  # type: ignore[arg-type]
    trace.write()
    assert list(_events(tmp_path / "trace.json")[0]) == ["a"]
    assert f"node b: {told}; the trace has none of its tasks" in caplog.text


def test_a_node_notes_its_first_tasks() -> None:
    log = SpanLog(2)
    for layer in range(3):
        log.record(_span(0.0, layer))
    assert [span.task.layer for span in log.spans] == [0, 1]
