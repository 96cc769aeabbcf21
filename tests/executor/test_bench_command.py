"""The benchmark's one line: what it holds, that it adds up, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costmodel.calibration.measured_runs import read_runs
from costmodel.plan.policy import LanePolicy, Placement, Policy
from executor import bench
from executor.model.sampling import Sampler
from executor.run.results import BlockResult
from executor.run.runner import Runner
from executor.stores.kv_cache import KVCache
from profiles.errors import RunError
from profiles.units import MIB
from tests.executor.commands import Ended, end_command
from tests.executor.tiny_machines import ON_DISK, change_policy, make_hardware, make_policy
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.plain_models import plain_config, plain_model

PROMPT_LEN, GEN_LEN = 6, 4
SHAPES: dict[str, Any] = {"num_layers": 3, "num_kv_heads": 2, "vocab_size": VOCAB_SIZE}
SPEC = plain_model(**SHAPES)
HARDWARE = make_hardware(gpu=True)
SPREAD = Placement(gpu=0.3, cpu=0.3, disk=0.4)

Bench = Callable[..., Ended]


@pytest.fixture
def policy_path(tmp_path: Path) -> Path:
    """A policy that uses every channel."""
    policy = change_policy(
        make_policy(SPEC, prompt_len=PROMPT_LEN, gen_len=GEN_LEN),
        weights=SPREAD,
        cache=SPREAD,
        activations=SPREAD,
        cpu_attention=0.5,
        hardware=HARDWARE,
    )
    path = tmp_path / "policy.json"
    policy.save(path)
    return path


@pytest.fixture
def run_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Bench:
    offload = tmp_path / "offload"
    offload.mkdir()

    def call(*arguments: object) -> Ended:
        flags = [*arguments, f"--offload-dir={offload}"]
        return end_command(bench.main, flags, monkeypatch, capfd)

    return call


def figures_of(ended: Ended) -> dict[str, Any]:
    """Return the one line that the command has printed."""
    assert ended.status == 0, ended.err
    (line,) = ended.out.splitlines()
    figures: dict[str, Any] = json.loads(line)
    return figures


def test_the_line_holds_everything_and_adds_up(policy_path: Path, run_bench: Bench) -> None:
    figures = figures_of(run_bench("--policy", policy_path, "--dummy-weights"))
    policy = Policy.load(policy_path)
    assert figures["emulated_gpu"] is True
    assert (figures["model"], figures["machine"]) == ("tiny", HARDWARE.name)
    assert (figures["num_prompts"], figures["num_blocks"], figures["block_size"]) == (4, 1, 4)
    assert figures["generated_tokens"] == 4 * GEN_LEN
    spread = {"gpu": 0.3, "cpu": 0.3, "disk": 0.4}
    assert figures["weights"] == dict.fromkeys(SPEC.component_names, spread)
    assert figures["cpu_attention"] == policy.cpu_attention
    seconds = figures["prefill_s"] + figures["decode_s"]
    assert figures["measured_tok_per_s"] == pytest.approx(4 * GEN_LEN / seconds)
    assert figures["attainment"] == pytest.approx(figures["lower_bound_s"] / seconds)
    assert 0 < figures["attainment"] < 1.2
    channels = {"disk_read", "disk_write", "h2d", "d2h", "gpu_compute", "cpu_compute"}
    for name in ("busy_s", "waiting_s", "blocked_s", "moved_bytes"):
        assert set(figures[name]) == channels, name
    for channel in channels:
        busy, waiting = figures["busy_s"][channel], figures["waiting_s"][channel]
        assert 0 < busy <= seconds
        assert busy + waiting == pytest.approx(seconds)
        assert 0 <= figures["blocked_s"][channel] <= waiting
        assert (figures["moved_bytes"][channel] > 0) == (not channel.endswith("compute"))
    assert (
        set(figures["predicted_peak_bytes"]) == set(figures["peak_bytes"]) == {"cpu + gpu", "disk"}
    )
    wanted = {
        "predicted_tok_per_s",
        "predicted_prefill_s",
        "predicted_decode_s",
        "bottleneck",
        "prefill_batch_size",
        "gpu_batch_size",
        "num_gpu_batches",
        "torch",
        "python",
    }
    assert wanted <= set(figures)


def test_more_prompts_are_more_blocks(policy_path: Path, run_bench: Bench) -> None:
    figures = figures_of(run_bench("--policy", policy_path, "--dummy-weights", "--num-prompts=6"))
    assert (figures["num_prompts"], figures["num_blocks"]) == (6, 2)
    assert figures["generated_tokens"] == 6 * GEN_LEN


def test_runs_come_into_a_table(tmp_path: Path, policy_path: Path, run_bench: Bench) -> None:
    """As what they were: on an emulated GPU, by whatever the model is found."""
    table = tmp_path / "runs.csv"
    save_tiny_model(tmp_path / "model", "llama", num_layers=3)
    flags = ("--policy", policy_path, "--runs", table)
    figures = [figures_of(run_bench(*flags, "--model", tmp_path / "model")) for _ in range(2)]
    runs = read_runs(table)
    assert [run.decode_s for run in runs] == pytest.approx([f["decode_s"] for f in figures])
    policy = Policy.load(policy_path)
    for run in runs:
        assert run.policy.weights == policy.weights and run.policy.cache == policy.cache
        assert run.policy.cpu_attention == policy.cpu_attention
        assert run.emulated is not None and HARDWARE.gpu is not None
        assert run.emulated.memory_bytes == HARDWARE.gpu.memory_bytes
    ended = run_bench("--policy", policy_path, "--dummy-weights", "--runs", tmp_path / "no" / "x")
    assert ended.status == 2 and "--runs" in ended.err


def test_prompts_are_drawn_with_the_seed_at_full_length(
    policy_path: Path, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, drawn = Runner.run, []

    def spy(runner: Runner, prompts: Sequence[Sequence[int]]) -> Iterator[BlockResult]:
        drawn.append(prompts)
        assert not runner.eos_ids
        assert isinstance(runner.sampler, Sampler) and runner.sampler.is_greedy
        return original(runner, prompts)

    monkeypatch.setattr(Runner, "run", spy)
    for seed in (0, 1, 0):
        figures_of(run_bench("--policy", policy_path, "--dummy-weights", f"--seed={seed}"))
    assert drawn[0] == drawn[2] != drawn[1]
    for prompts in drawn:
        assert [len(ids) for ids in prompts] == [PROMPT_LEN] * 4
        assert {type(token) for ids in prompts for token in ids} == {int}
        assert all(0 <= token < VOCAB_SIZE for ids in prompts for token in ids)


def test_searches_by_itself(tmp_path: Path, run_bench: Bench) -> None:
    config, profile = tmp_path / "config.json", tmp_path / "profile.json"
    config.write_text(json.dumps(plain_config(**SHAPES)))
    make_hardware().save(profile)
    flags = [
        "--hardware",
        profile,
        "--model",
        config,
        "--dummy-weights",
        "--dtype=bfloat16",
        "--prompt-len=8",
        "--gen-len=3",
        "--num-prompts=5",
        "--cpu-memory=64MiB",
    ]
    figures = figures_of(run_bench(*flags))
    assert (figures["prompt_len"], figures["gen_len"], figures["num_prompts"]) == (8, 3, 5)
    assert figures["dtype"] == "bfloat16"
    assert figures["predicted_peak_bytes"]["cpu"] <= 64 * MIB


def test_jobs_of_mixed_lengths(tmp_path: Path, run_bench: Bench) -> None:
    lengths, policy, runs = (tmp_path / name for name in ("lengths.csv", "policy.json", "runs.csv"))
    lengths.write_text("prompt_len,gen_len,max_tokens\n5,2,7\n3,4,4\n6,1,2\n")
    lanes = LanePolicy(pool_tokens=3 * 32, pass_rows=16, chunk_rows=16)
    base = make_policy(SPEC, prompt_len=PROMPT_LEN, gen_len=7)
    change_policy(base, hardware=make_hardware(), lanes=lanes).save(policy)
    flags = ["--policy", policy, "--dummy-weights", "--lengths", lengths, "--runs", runs]
    figures = figures_of(run_bench(*flags))
    told = figures["lanes"]
    assert (told["prompt_tokens"], told["output_tokens"]) == (14, 13)
    assert told["expected_output_tokens"] == 7
    assert "5:2:7:7*1" in runs.read_text()


def test_runs_a_checkpoint_under_another_profile(
    tmp_path: Path, policy_path: Path, run_bench: Bench
) -> None:
    save_tiny_model(tmp_path / "model", "llama", num_layers=3)
    profile = tmp_path / "profile.json"
    replace(HARDWARE, name="another").save(profile)
    figures = figures_of(
        run_bench("--policy", policy_path, "--model", tmp_path / "model", "--hardware", profile)
    )
    assert figures["machine"] == "another"


REFUSALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "two models": (("--policy", "P", "--dummy-weights", "--model=opt-125m"), ("--model",)),
    "no model": (("--hardware=cpu-2core",), ("--model", "nothing")),
    "no weights": (("--hardware=cpu-2core", "--model=opt-125m"), ("preset", "--dummy-weights")),
    "no such folder": (("--policy", "P", "--model=/nowhere"), ("/nowhere", "no such folder")),
    "no such preset": (("--hardware=cpu-2core", "--model=opt-7", "--dummy-weights"), ("opt-7",)),
    "planned": (("--policy", "P", "--dummy-weights", "--prompt-len=9"), ("--prompt-len",)),
    "lengths": (("--policy", "P", "--dummy-weights", "--lengths=/nowhere.csv"), ("nowhere.csv",)),
    "both": (
        ("--policy", "P", "--dummy-weights", "--lengths=l.csv", "--num-prompts=2"),
        ("one of",),
    ),
    "no prompts": (("--policy", "P", "--dummy-weights", "--num-prompts=0"), ("--num-prompts",)),
    "seed": (("--policy", "P", "--dummy-weights", "--seed=-1"), ("seed",)),
    "trace": (("--policy", "P", "--dummy-weights", "--trace=/nowhere/t.json"), ("--trace",)),
    "profile": (("--policy", "P", "--dummy-weights", "--hardware=no.json"), ("profile",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line(policy_path: Path, run_bench: Bench, case: str) -> None:
    arguments, words = REFUSALS[case]
    ended = run_bench(*(str(policy_path) if a == "P" else a for a in arguments))
    assert (ended.status, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_a_policy_that_does_not_fit_is_refused(
    tmp_path: Path, policy_path: Path, run_bench: Bench
) -> None:
    small = tmp_path / "small.json"
    HARDWARE.with_budget(cpu_memory=4096).save(small)
    ended = run_bench("--policy", policy_path, "--dummy-weights", "--hardware", small)
    assert (ended.status, ended.out) == (3, "")
    (line,) = ended.err.splitlines()
    assert "cpu is short by" in line


def test_a_run_that_fails_prints_no_figures(
    tmp_path: Path, policy_path: Path, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise RunError("the disk is full")

    monkeypatch.setattr(KVCache, "write", fail)
    replace(Policy.load(policy_path), cache=ON_DISK).save(policy_path)
    trace = tmp_path / "results" / "trace.json"
    trace.parent.mkdir()
    ended = run_bench("--policy", policy_path, "--dummy-weights", "--trace", trace)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.splitlines()[-1] == "error: the disk is full"
    assert list(trace.parent.iterdir()) == []
