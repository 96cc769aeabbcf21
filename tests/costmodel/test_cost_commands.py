"""The commands of ``costmodel``: flags, files, what is printed and how it ends."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from costmodel.plan.policy import Policy
from costmodel.pricing.memory import capacities
from costmodel.pricing.price import estimate
from profiles import HardwareProfile, recorded_profile, with_emulated_gpu
from profiles.files import to_json
from profiles.units import GIB
from tests.executor.commands import Ended, end_command

PAPER = Path(__file__).parents[2] / "notebooks" / "data" / "flexgen_paper.csv"


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command by its name and flags, in this process and a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def here(command: str, *flags: str) -> Ended:
        main = importlib.import_module(f"costmodel.{command}").main
        return end_command(main, flags, monkeypatch, capfd)

    return here


@pytest.fixture
def search(run: Run) -> Run:
    """Run ``costmodel.search`` in the same way."""
    return functools.partial(run, "search")


def test_hardware_alone_is_a_complete_command(tmp_path: Path, search: Run) -> None:
    recorded_profile("t4-flexgen").save(tmp_path / "profile.json")
    done = search("--hardware", "profile.json")
    assert (done.status, done.err) == (0, "")
    policy = Policy.load(tmp_path / "policy.json")
    assert policy.model.name == "opt-30b"
    assert (policy.workload.prompt_len, policy.workload.gen_len) == (512, 32)
    assert policy.predicted == estimate(policy, recorded_profile("t4-flexgen"))
    for said in ("opt-30b", "token/s", "limited by", "peak gpu", "peak disk", "policy.json"):
        assert said in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "profile.json"]


def test_explanation_and_json_line(tmp_path: Path, search: Run) -> None:
    done = search(
        "--hardware",
        "t4-flexgen",
        "--model",
        "opt-6.7b",
        "--num-prompts",
        "100",
        "--explain",
        "--json",
        "--output",
        "other.json",
    )
    assert done.status == 0, done.err
    last = done.out.splitlines()[-1]
    assert json.loads(last) == to_json(Policy.load(tmp_path / "other.json"))
    assert sum(line.startswith("{") for line in done.out.splitlines()) == 1
    for said in (
        "bound: no policy exceeds",
        "busy seconds",
        "at its peak",
        "workspace",
        "shadow prices",
        "4.00 GiB more GPU memory",
        "twice the disk's rates",
    ):
        assert said in done.out


def test_what_four_bits_would_yield_is_told_and_not_done(tmp_path: Path, search: Run) -> None:
    done = search("--hardware", "t4-flexgen", "--num-prompts", "64")
    assert (done.status, done.err) == (0, "")
    policy = Policy.load(tmp_path / "policy.json")
    assert not policy.is_compressed and policy.predicted is not None
    told = re.search(r"with 4 bits for weights .* token/s \((\S+) x\)", done.out)
    assert told is not None and float(told[1]) > 1
    assert "--cache-bits 16,4" in done.out


def test_what_is_permitted_reaches_the_policy_and_are_told(tmp_path: Path, search: Run) -> None:
    done = search(
        "--hardware",
        "t4-flexgen",
        "--num-prompts",
        "64",
        "--margin",
        "0.1",
        "--weight-bits",
        "16,4",
        "--sparsity",
        "0.1",
        "--group-size",
        "32",
    )
    assert (done.status, done.err) == (0, "")
    policy = Policy.load(tmp_path / "policy.json")
    assert (policy.weight_bits, policy.cache_bits, policy.group_size) == (4, 16, 32)
    assert "weights in 4 bits" in done.out
    assert (policy.attention_sparsity < 1) == ("10% of the keys" in done.out)
    assert policy.predicted is not None and policy.hardware is not None
    for tier, capacity in capacities(policy.hardware).items():
        assert policy.predicted.peak_bytes[tier] <= 0.9 * capacity


def test_a_policy_is_simulated_and_drawn_as_a_timeline(
    tmp_path: Path, run: Run, search: Run
) -> None:
    assert search("--hardware", "t4-flexgen", "--num-prompts", "9").status == 0
    done = run(
        "simulate",
        "--hardware",
        "t4-flexgen",
        "--policy",
        "policy.json",
        "--passes",
        "3",
        "--output",
        "timeline.json",
        "--json",
    )
    assert done.status == 0, done.err
    figures = json.loads(done.out.splitlines()[-1])
    assert figures["simulated_s"] == pytest.approx(figures["predicted_s"], rel=0.05)
    assert figures["passes"] == 3 and figures["busy_s"]["h2d"] > 0
    events = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["args"]["token"] for event in events if event["ph"] == "X"} == {0, 1, 2}


def test_a_machine_is_calibrated(tmp_path: Path, run: Run, search: Run) -> None:
    rows = PAPER.read_text(encoding="utf-8").splitlines()
    (tmp_path / "runs.csv").write_text("\n".join(rows[:4]) + "\n", encoding="utf-8")
    flags = ("--hardware", "t4-flexgen", "--runs", "runs.csv", "--json")
    done = run("calibrate", *flags)
    assert done.status == 0, done.err
    figures = json.loads(done.out.splitlines()[-1])
    assert figures["mean_error_after"] < figures["mean_error_before"]
    loaded = HardwareProfile.load(tmp_path / "calibrated.json")
    assert dict(loaded.calibrations[0].factors) == figures["factors"]
    assert loaded.calibrations[0].source == "runs.csv"
    found = search("--hardware", "calibrated.json", "--num-prompts", "9")
    assert found.status == 0, found.err


def test_a_run_of_another_machine_is_named(tmp_path: Path, run: Run) -> None:
    """The paper's first run has weights on a GPU, which this machine lacks."""
    done = run("calibrate", "--hardware", "cpu-2core", "--runs", str(PAPER))
    assert done.status == 2 and not (tmp_path / "calibrated.json").exists()
    (line,) = done.err.splitlines()
    assert f"{PAPER.name}, line 2" in line and "no GPU" in line


def test_flags_reach_the_policy(tmp_path: Path, search: Run) -> None:
    done = search(
        "--hardware",
        "t4-flexgen",
        "--model",
        "opt-1.3b",
        "--prompt-len",
        "100",
        "--gen-len",
        "7",
        "--num-prompts",
        "12",
        "--gpu-memory",
        "2GB",
        "--cpu-memory",
        "8GiB",
        "--disk",
        "10GB",
        "--max-latency",
        "10min",
        "--dtype",
        "float32",
    )
    assert (done.status, done.err) == (0, "")
    policy = Policy.load(tmp_path / "policy.json")
    hardware = policy.hardware
    assert hardware is not None and hardware.gpu is not None
    assert policy.workload.num_prompts == 12 and policy.workload.context_len == 106
    assert hardware.gpu.memory_bytes == 2 * 10**9
    assert hardware.cpu.memory_bytes == 8 * GIB
    assert hardware.disk.free_bytes == 10**10
    assert (policy.model.dtype, policy.weight_bits) == ("float32", 32)
    assert hardware.measurements == ()


def test_float16_models_compute_in_bfloat16_on_a_cpu_and_say_so(
    tmp_path: Path, search: Run
) -> None:
    flags = ("--hardware", "cpu-2core", "--model", "opt-125m", "--gen-len", "4")
    done = search(*flags)
    assert done.status == 0 and done.err.startswith("note: ")
    assert Policy.load(tmp_path / "policy.json").model.dtype == "bfloat16"
    done = search(*flags, "--dtype", "float16")
    assert (done.status, done.err) == (0, "")
    assert Policy.load(tmp_path / "policy.json").model.dtype == "float16"


def test_an_emulated_gpu_is_called_that(tmp_path: Path, run: Run, search: Run) -> None:
    profile = with_emulated_gpu(
        recorded_profile("cpu-2core"), memory_bytes=GIB, link_bytes_per_s=2e9
    )
    profile.save(tmp_path / "profile.json")
    hardware = ("--hardware", "profile.json")
    done = search(*hardware, "--model", "qwen2.5-0.5b")
    assert done.status == 0 and "emulated" in done.out
    done = run("estimate", *hardware, "--policy", "policy.json")
    assert done.status == 0 and "emulated" in done.out


def test_estimate_says_what_search_said(tmp_path: Path, run: Run, search: Run) -> None:
    flags = ("--hardware", "cpu-2core")
    search(*flags, "--model", "llama-3.2-1b", "--num-prompts", "8")
    done = run("estimate", *flags, "--policy", "policy.json", "--json")
    assert done.status == 0, done.err
    predicted = Policy.load(tmp_path / "policy.json").predicted
    assert json.loads(done.out.splitlines()[-1]) == to_json(predicted)


def test_estimate_of_what_does_not_fit_prints_the_price_and_ends_with_3(
    tmp_path: Path, run: Run, search: Run
) -> None:
    search("--hardware", "cpu-2core", "--model", "llama-3.2-1b")
    small = recorded_profile("cpu-2core").with_budget(cpu_memory=GIB)
    small.save(tmp_path / "small.json")
    done = run("estimate", "--hardware", "small.json", "--policy", "policy.json")
    assert done.status == 3
    assert "token/s" in done.out
    assert done.err.startswith("error: ") and "cpu is short by" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--hardware", "missing.json"), 2, "missing.json"),
        (("--hardware", "t4"), 2, "t4-flexgen"),
        (("--hardware", "cpu-2core", "--disk", "9000000"), 2, "9000000B"),
        (("--hardware", "cpu-2core", "--model", "gpt-5"), 2, "gpt-5"),
        (("--hardware", "cpu-2core", "--cpu-memory", "8 apples"), 2, "--cpu-memory"),
        (("--hardware", "cpu-2core", "--gen-len", "0"), 2, "gen_len"),
        (("--hardware", "cpu-2core", "--prompt-len", "4096"), 2, "positions"),
        (("--hardware", "cpu-2core", "--gpu-memory", "1GiB"), 2, "--gpu-memory"),
        (("--hardware", "cpu-2core", "--dtype", "int3"), 2, "int3"),
        (("--hardware", "cpu-2core", "--output", "no/such/folder.json"), 2, "no/such"),
        (("--hardware", "cpu-2core", "--output", "."), 2, "a folder"),
        (("--hardware", "cpu-2core", "--num-prompts", "0"), 2, "num_prompts"),
        (("--hardware", "cpu-2core", "--speed", "9"), 2, "--speed"),
        (("--hardware", "cpu-2core", "--margin", "1"), 2, "--margin"),
        (("--hardware", "cpu-2core", "--weight-bits", "2"), 2, "16, 8, 4"),
        (("--hardware", "cpu-2core", "--sparsity", "0"), 2, "--sparsity"),
        (("--hardware", "cpu-2core", "--group-size", "32"), 2, "--weight-bits"),
        (("--hardware", "cpu-2core", "--plot", "no/such/plot.png"), 2, "--plot"),
        (("--hardware", "t4-flexgen", "--cpu-memory", "0"), 3, "--cpu-memory"),
        ((), 2, "--hardware"),
        (("--hardware", "t4-flexgen", "--cpu-memory", "2GB", "--disk", "0"), 3, "short by"),
        (("--hardware", "t4-flexgen", "--max-latency", "1s"), 3, "--max-latency"),
    ],
)
def test_mistakes_end_in_one_line(
    flags: tuple[str, ...], status: int, said: str, tmp_path: Path, search: Run
) -> None:
    done = search(*flags)
    lines = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert (done.status, len(lines)) == (status, 1), done.err
    assert lines[0].startswith("error: ") and said in lines[0]
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def _broken(change: str) -> str:
    """Return a recorded profile's text with one thing wrong."""
    value = to_json(recorded_profile("cpu-2core"))
    rates = value["disk"]["read"]["rates"]
    if change == "no compute":
        del value["cpu"]["compute"]
    elif change == "no rates":
        rates.clear()
    elif change in ("NaN", "-1.0", "0.0"):
        rates[0] = float(change)
    text = json.dumps(value)
    return {"truncated": text[: len(text) // 2], "not JSON": "a profile"}.get(change, text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("truncated", "not JSON"),
        ("not JSON", "not JSON"),
        ("NaN", "NaN"),
        ("-1.0", "disk.read"),
        ("0.0", "disk.read"),
        ("no rates", "disk.read"),
        ("no compute", "compute"),
    ],
)
def test_broken_profiles_end_in_one_line(
    change: str, said: str, tmp_path: Path, search: Run
) -> None:
    (tmp_path / "profile.json").write_text(_broken(change))
    done = search("--hardware", "profile.json")
    assert (done.status, done.err.count("\n"), done.out) == (2, 1, ""), done.err
    assert done.err.startswith("error: ") and said in done.err
    assert "profile.json" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_model_of_another_family_ends_in_one_line(tmp_path: Path, search: Run) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    done = search("--hardware", "cpu-2core", "--model", ".")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: ") and "mamba" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, costmodel, costmodel.search, costmodel.estimate\n"
        "heavy = {'torch', 'scipy', 'pandas', 'matplotlib', 'bokeh', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
