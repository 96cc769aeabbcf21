"""The page of a run: what was measured beside what was predicted, and the same from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from costmodel.plan.policy import Placement
from costmodel.report import page as report_page
from costmodel.report.buying import Purchases
from costmodel.schedule.chrome_trace import write_trace
from costmodel.schedule.timeline import simulate
from executor import bench, report
from executor.checkpoint.dummy import DummyCheckpoint
from executor.cli.run_command import Job
from executor.cli.run_report import Report
from executor.model.sampling import Sampler
from profiles.errors import InputError
from profiles.units import format_bytes, format_figure, format_seconds
from tests import browser
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy
from tests.plain_models import plain_model
from tests.report_page import SECTIONS, read_page

PROMPT_LEN, GEN_LEN, NUM_PROMPTS = 6, 4, 8
SPEC = plain_model(num_kv_heads=2)
HARDWARE = make_hardware(gpu=True)
SPREAD = Placement(gpu=0.3, cpu=0.3, disk=0.4)
POLICY = replace(
    change_policy(
        make_policy(SPEC, prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=NUM_PROMPTS),
        weights=SPREAD,
        cache=SPREAD,
        activations=SPREAD,
        cpu_attention=0.5,
    ),
    hardware=HARDWARE,
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of two blocks on all channels, and the files that it left."""

    report: Report
    trace: Path
    page: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    job = Job(
        policy=POLICY,
        hardware=HARDWARE,
        source=DummyCheckpoint(spec=SPEC),
        prompts=[[3 + i] * PROMPT_LEN for i in range(NUM_PROMPTS)],
        sampler=Sampler(),
    )
    trace, page = folder / "trace.json", folder / "page.html"
    with job.recording(trace, page) as recorder:
        found = job.run(folder, planned=job.predict(), recorder=recorder)
        assert not page.exists()
    return Run(report=found, trace=trace, page=page)


def test_the_page_shows_measured_beside_predicted(run: Run) -> None:
    page, found = read_page(run.page), run.report
    assert page.sections == SECTIONS
    rows = page.tables["phases"]
    assert rows["prefill"][1] == format_seconds(found.phase_s["prefill"])
    assert rows["decode"][:2] == [
        format_seconds(sum(p.decode_s for p in found.predictions)),
        format_seconds(found.phase_s["decode"]),
    ]
    assert rows["token/s"][1] == format_figure(found.measured_tok_per_s)
    assert page.tables["memory"]["measured peak"][2] == format_bytes(found.peak_bytes["disk"])
    together = format_bytes(found.peak_bytes["cpu + gpu"])
    assert f"Together, cpu + gpu peaked at {together}" in page.text
    busy = page.tables["limits"]
    for channel, seconds in found.phase_busy_s["decode"].items():
        assert busy[f"{channel}, decode"][1] == format_seconds(seconds)


def test_the_timeline_has_the_first_block_measured_and_simulated(run: Run) -> None:
    page = read_page(run.page)
    events = json.loads(run.trace.read_text())["traceEvents"]
    for picture, phase in (("timeline-1", "prefill"), ("timeline-2", "decode")):
        for label in ("measured", "simulated"):
            (pid,) = (e["pid"] for e in events if e["args"].get("name") == label)
            tasks = [
                event
                for event in events
                if event["ph"] == "X"
                and (event["pid"], event["cat"], event["args"]["block"]) == (pid, phase, 0)
            ]
            bars = [b for b in page.bars(picture) if f"({label})" in b["text"]]
            assert len(bars) == len(tasks) > 0
            took = sorted(bar["right"] - bar["left"] for bar in bars)
            assert took == pytest.approx(sorted(t["dur"] / 1e6 for t in tasks), abs=1e-9)
    moved = [
        event["args"]["bytes"]
        for event in events
        if "bytes" in event["args"] and (event["cat"], event["args"]["block"]) == ("decode", 0)
    ]
    text = "\n".join(bar["text"] for bar in page.bars("timeline-2"))
    assert moved and all(f"moved {format_bytes(n)}," in text for n in moved) and "waited" in text


def test_a_trace_holds_all_that_a_page_needs(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "again.html"
    report.main([str(run.trace), "-o", str(output)])
    assert capsys.readouterr().out == f"report written to {output}\n"
    again, page = read_page(output), read_page(run.page)
    assert again.tables == page.tables
    assert json.loads(again.policy) == json.loads(page.policy)
    for picture in page.pictures:
        texts = [sorted(bar["text"] for bar in p.bars(picture)) for p in (again, page)]
        assert texts[0] == texts[1], picture


@pytest.fixture
def no_purchases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test the searches on other machines, which take most of a small page's time."""
    monkeypatch.setattr(
        report_page, "purchases_of_policy", lambda *_: Purchases(problem="not asked")
    )


@pytest.mark.usefixtures("no_purchases")
def test_a_policy_becomes_a_page_too(tmp_path: Path) -> None:
    path, output = tmp_path / "policy.json", tmp_path / "plan.html"
    replace(POLICY, hardware=None).save(path)
    with pytest.raises(InputError, match="--hardware"):
        report.main([str(path), "-o", str(output)])
    HARDWARE.save(tmp_path / "profile.json")
    report.main([str(path), "-o", str(output), f"--hardware={tmp_path / 'profile.json'}"])
    page = read_page(output)
    assert page.sections == SECTIONS and "Nothing was run" in page.text


@pytest.mark.usefixtures("no_purchases")
def test_the_bench_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, output = tmp_path / "policy.json", tmp_path / "bench.html"
    POLICY.save(policy)
    bench.main(
        [
            f"--policy={policy}",
            "--dummy-weights",
            "--num-prompts=4",
            f"--report={output}",
            f"--offload-dir={tmp_path}",
        ]
    )
    (line,) = capsys.readouterr().out.splitlines()
    rows = read_page(output).tables["phases"]
    assert rows["decode"][1] == format_seconds(json.loads(line)["decode_s"])


def test_what_is_no_run_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    def refuse(text: str, *more: str) -> str:
        path = tmp_path / "file.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as told:
            report.main([str(path), "-o", str(tmp_path / "page.html"), *more])
        assert "\n" not in str(told.value)
        return str(told.value)

    sound: Json = json.loads(run.trace.read_text())
    simulated = tmp_path / "simulated.json"
    write_trace(simulated, simulate(POLICY, HARDWARE).tasks, label="predicted")
    assert "a timeline without a run" in refuse(simulated.read_text())
    assert "not JSON" in refuse("{")
    assert "--hardware" in refuse(json.dumps(sound), "--hardware=t4-flexgen")
    measured = sound["run"]["measured"]
    wrong_figures: list[tuple[str, Any]] = [
        ("phase_s", {"prefill": 1.0}),
        ("num_passes", 0),
        ("busy_s", {"prefill": {"bus": 1.0}, "decode": {}}),
        ("predicted_peak_bytes", {"cpu": 1}),
        ("tok_per_s", "fast"),
    ]
    for name, value in wrong_figures:
        broken = sound | {"run": sound["run"] | {"measured": measured | {name: value}}}
        assert f"measured.{name}: got" in refuse(json.dumps(broken))
    for events in (None, [1], [{"ph": "X"}], [*sound["traceEvents"], {"name": "process_name"}]):
        assert "not a task" in refuse(json.dumps(sound | {"traceEvents": events}))
    last = sound["traceEvents"][-1]
    wrong_events: list[Json] = [{"dur": -1.0}, {"ts": 1e999}, {"cat": "other"}, {"tid": []}]
    for wrong_event in wrong_events:
        events = [*sound["traceEvents"], last | {"args": last["args"] | {"block": 0}} | wrong_event]
        text = json.dumps(sound | {"traceEvents": events}).replace("Infinity", "1e999")
        assert "not a task" in refuse(text)
    with pytest.raises(InputError, match="FILE"):
        report.main([str(run.trace), "-o", str(run.trace)])


CHROMIUM = browser.find_chromium()
# Every text that is drawn by the browser itself: its colour against that of what is behind it.
CONTRASTS = """(() => {
  const parse = text => { const [r, g, b, a] = text.match(/[0-9.]+/g).map(Number);
    return {rgb: [r, g, b], a: a === undefined ? 1 : a}; };
  const luminance = rgb => { const [r, g, b] = rgb.map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (one, other) => { const [a, b] = [luminance(one), luminance(other)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  const behind = element => { for (; element; element = element.parentElement) {
    const color = parse(getComputedStyle(element).backgroundColor);
    if (color.a) return color.rgb; } return [255, 255, 255]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const color = parse(getComputedStyle(element).color).rgb;
    found.push([node.data.trim().slice(0, 40), ratio(color, behind(element))]);
  }
  // Bokeh draws these texts on its canvases.
  const paint = text => { const probe = document.createElement("i"); probe.style.color = text;
    document.body.append(probe); const color = parse(getComputedStyle(probe).color).rgb;
    probe.remove(); return color; };
  const page = behind(document.body);
  const all = view => [view, ...Array.from(view.children()).flatMap(all)];
  for (const view of Bokeh.index.roots.flatMap(all))
    for (const axis of view.axis_views ?? [])
      for (const name of ["major_label_text", "axis_label_text"])
        found.push([`${name} of ${axis.model.type}`,
          ratio(paint(axis.visuals[name].get_text_color()), page)]);
  return found;
})()"""


@pytest.fixture(scope="module")
def opened() -> Iterator[browser.Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed, so no page was opened in one")
    with browser.open_browser(CHROMIUM) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_all_of_it_without_network(
    width: int, scheme: str, run: Run, opened: browser.Page
) -> None:
    opened.open(run.page, width=width, scheme=scheme)
    pictures = [*read_page(run.page).pictures]
    assert opened.evaluate("Promise.all(drawn).then(views => views.length)") == len(pictures)
    complaints = [
        event
        for event in opened.events
        if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
        or (
            event["method"] == "Runtime.consoleAPICalled"
            and event["params"]["type"] in ("error", "warning", "assert")
        )
    ]
    assert complaints == []
    requests = [
        event["params"]["request"]["url"]
        for event in opened.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in requests if not url.startswith("data:")} == {run.page.as_uri()}
    # Nothing is wider than the window, and every picture is there.
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    sizes = opened.evaluate(
        """[...document.querySelectorAll(".picture")].map(picture => {
        const box = picture.getBoundingClientRect();
        return [picture.id, box.width, box.height]; })"""
    )
    assert [name for name, *_ in sizes] == pictures
    for name, wide, high in sizes:
        assert wide > 0.8 * min(width, 1100) - 32 and high > 90, name
    found = opened.evaluate(CONTRASTS)
    assert len([text for text, _ in found if text.startswith("major_label_text")]) >= 2 * len(
        pictures
    )
    assert [pair for pair in found if pair[1] < 4.5] == []
