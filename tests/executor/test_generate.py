"""The command: what it writes, what it refuses and how, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from costmodel import calibrate
from costmodel.calibration.measured_runs import read_runs
from costmodel.model.layout import model_layers
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import overall_weights
from costmodel.plan.workload import Workload
from costmodel.pricing.price import estimate
from executor import generate, machine_profile
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.stored_tensors import INDEX_NAME
from executor.jobs.journal import journal_path
from executor.run.block import Block
from executor.stores.scratch_file import ScratchFile
from executor.stores.weight_file import WeightFile
from profiles import HardwareProfile, with_emulated_gpu
from profiles.errors import InfeasibleError, RunError
from profiles.files import to_json
from profiles.units import MIB
from tests.executor.commands import Ended, end_command
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    change_policy,
    make_hardware,
    make_policy,
)
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

GEN_LEN = 5
# A tokenizer whose words are its ids: w7 is token 7.
PROMPTS = [[5, 9, 170, 3], [12], [88, 1, 2, 3, 4, 5, 6, 7], [33, 34], [9, 8, 7]]
HARDWARE = make_hardware()


class Desk:
    """A checkpoint, prompts and folders of one test, and the command run on them."""

    def __init__(self, root: Path, run_command: Callable[[list[str]], Ended]) -> None:
        self.run_command = run_command
        self.model = root / "model"
        self.offload = root / "offload"
        self.results = root / "results"
        self.prompts = root / "prompts.jsonl"
        self.policy = root / "policy.json"
        self.profile = root / "profile.json"
        self.output = self.results / "outputs.jsonl"
        self.offload.mkdir()
        self.results.mkdir()
        HARDWARE.save(self.profile)
        self.write_prompts([{"prompt_ids": ids} for ids in PROMPTS])

    def write_prompts(self, lines: list[dict[str, Any]]) -> None:
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write_policy(self, *, hardware: HardwareProfile = HARDWARE, **changes: Any) -> Policy:
        """Save a policy for the model; everything is on the CPU but what ``changes`` says."""
        spec = Checkpoint.open(self.model).spec
        base = make_policy(spec, prompt_len=max(map(len, PROMPTS)), gen_len=GEN_LEN)
        policy = change_policy(base, hardware=hardware, **changes)
        policy.save(self.policy)
        return policy

    def arguments(self, *more: object, policy: bool = True) -> list[str]:
        flags = {"model": self.model, "prompts": self.prompts, "output": self.output}
        flags |= {"offload-dir": self.offload}
        if policy:
            flags["policy"] = self.policy
        return [*(f"--{k}={v}" for k, v in flags.items()), *map(str, more)]

    def generate(self, *more: object, policy: bool = True) -> Ended:
        return self.run_command(self.arguments(*more, policy=policy))

    def outputs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def expected(self) -> list[list[int]]:
        return ReferenceModel(Checkpoint.open(self.model)).generate(PROMPTS, GEN_LEN)

    def check_refused(self, ended: Ended, status: int, *words: str) -> None:
        """One line, the right status, and nothing anywhere."""
        lines = ended.err.splitlines()
        assert ended.status == status, ended.err
        assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
        for word in words:
            assert word in lines[0]
        assert list(self.results.iterdir()) == []
        if self.offload.is_dir():
            assert list(self.offload.iterdir()) == []


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model(folder, "llama", num_layers=6, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], Ended]:
    return lambda arguments: end_command(generate.main, arguments, monkeypatch, capfd)


@pytest.fixture
def desk(checkpoint: Path, tmp_path: Path, run_command: Callable[[list[str]], Ended]) -> Desk:
    shutil.copytree(checkpoint, tmp_path / "model")
    return Desk(tmp_path, run_command)


def test_outputs_come_in_order_with_everything(desk: Desk) -> None:
    expected = desk.expected()
    eos = expected[1][2]
    config = json.loads((desk.model / "config.json").read_text())
    (desk.model / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    (desk.model / "generation_config.json").unlink(missing_ok=True)
    lines: list[dict[str, Any]] = [{"prompt_ids": ids, "id": i} for i, ids in enumerate(PROMPTS)]
    lines[2] = {"tag": ["ü", None], "prompt": " ".join(f"w{i}" for i in PROMPTS[2])}
    desk.write_prompts(lines)
    desk.write_policy(cache=ON_DISK, weights=ON_DISK)
    ended = desk.generate("--json")
    assert (ended.status, ended.err) == (0, "")
    outputs = desk.outputs()
    for line, full, output in zip(lines, expected, outputs, strict=True):
        ends = [i for i, token in enumerate(full) if token == eos]
        ids = full[: ends[0] if ends else None]
        # Prompt and text join: the tokenizer puts a space between words.
        text = "".join(f" w{i}" for i in ids)
        reason = "stop" if ends else "length"
        assert output == line | {"text": text, "output_ids": ids, "finish_reason": reason}
    assert {output["finish_reason"] for output in outputs} == {"stop", "length"}
    figures = json.loads(ended.out.splitlines()[-1])
    assert figures["generated_tokens"] == sum(len(o["output_ids"]) for o in outputs)
    assert set(figures["peak_bytes"]) == {"cpu", "disk"}
    assert figures["measured_tok_per_s"] > 0 and figures["predicted_tok_per_s"] > 0
    assert list(desk.results.iterdir()) == [desk.output]
    assert not list(desk.offload.glob(".*"))


def test_ignore_eos_goes_on(desk: Desk) -> None:
    expected = desk.expected()
    config = json.loads((desk.model / "config.json").read_text())
    eos = {"eos_token_id": [row[1] for row in expected]}
    (desk.model / "generation_config.json").unlink(missing_ok=True)
    (desk.model / "config.json").write_text(json.dumps(config | eos))
    desk.write_policy()
    assert desk.generate().status == 0
    assert all(len(output["output_ids"]) <= 1 for output in desk.outputs())
    assert desk.generate("--ignore-eos").status == 0
    assert [output["output_ids"] for output in desk.outputs()] == expected


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("spare", [0.02, 0.3, 0.7, 3.0])
def test_a_policy_from_search_is_accepted(desk: Desk, gpu: bool, spare: float) -> None:
    """From the least memory in which anything fits up to more than enough."""
    hardware = least_memory(desk, spare, gpu=gpu)
    spec = Checkpoint.open(desk.model).spec
    workload = Workload(
        prompt_len=max(map(len, PROMPTS)), gen_len=GEN_LEN, num_prompts=len(PROMPTS)
    )
    policy = search(hardware, spec, workload, margin=0.0).policy
    assert overall_weights(policy).disk > 0 or spare > 0.1
    policy.save(desk.policy)
    ended = desk.generate("--json")
    assert ended.status == 0, ended.err
    assert [output["output_ids"] for output in desk.outputs()] == desk.expected()
    assert json.loads(ended.out.splitlines()[-1])["emulated_gpu"] == gpu
    assert ("emulated in CPU memory" in ended.out) == gpu


def least_memory(desk: Desk, spare: float, *, gpu: bool) -> HardwareProfile:
    """Return a machine with just what one sequence needs, all on disk, and a share of the rest."""
    hardware = make_hardware(gpu=gpu)
    spec = Checkpoint.open(desk.model).spec
    policy = make_policy(spec, prompt_len=max(map(len, PROMPTS)), gen_len=GEN_LEN)
    one = replace(policy, gpu_batch_size=1, num_gpu_batches=1, prefill_batch_size=1)
    least = estimate(change_policy(one, weights=ON_DISK, cache=ON_DISK), hardware).peak_bytes
    more = round(spare * sum(layer.num_bytes for layer in model_layers(spec)))
    return hardware.with_budget(
        cpu_memory=least["cpu"] + more, gpu_memory=least["gpu"] + more if gpu else None
    )


def test_searches_by_itself(desk: Desk) -> None:
    trace = desk.results / "trace.json"
    flags = ("--hardware", "cpu-2core", "--gen-len", GEN_LEN, "--trace", trace)
    ended = desk.generate(*flags, policy=False)
    assert (ended.status, ended.err) == (0, "")
    assert [output["output_ids"] for output in desk.outputs()] == desk.expected()
    assert "throughput" in ended.out
    assert {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]} == {1, 2}


@pytest.fixture
def kept(tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which this machine's profile was kept."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(
        machine_profile, "_kept", lambda what, suffix, offload_dir: folder / f"{what}.{suffix}"
    )
    (folder / "profile.json").write_bytes(desk.profile.read_bytes())
    return folder


def test_uses_the_kept_profile_of_this_machine(desk: Desk, kept: Path) -> None:
    before = (kept / "profile.json").read_bytes()
    ended = desk.generate("--gen-len", GEN_LEN, policy=False)
    assert ended.status == 0
    assert ended.err.startswith(f"this machine's profile: {kept / 'profile.json'}, ")
    assert len(ended.err.splitlines()) == 1
    assert [output["output_ids"] for output in desk.outputs()] == desk.expected()
    assert (kept / "profile.json").read_bytes() == before


def test_runs_are_kept_and_calibrate_the_next(
    desk: Desk, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_profile, "SHORTEST_S", 0.0)
    monkeypatch.setattr(machine_profile, "LEAST_RUNS", 2)
    monkeypatch.setattr(machine_profile, "MOST_RUNS", 2)
    for number in range(3):
        ended = desk.generate("--gen-len", GEN_LEN, "--json", policy=False)
        assert ended.status == 0, ended.err
        report = json.loads(ended.out.splitlines()[-1])
        assert len(read_runs(kept / "runs.csv")) == min(number + 1, 2)
        # The third is planned with what the first two told.
        assert (kept / "calibrated.json").exists() == (number == 2)
    last = read_runs(kept / "runs.csv")[-1]
    # Over lanes, which a fast machine may choose, there is one phase.
    in_lanes_s = last.num_tokens / last.throughput_tok_per_s
    expected_s = report["run_s"] if "lanes" in report else report["decode_s"]
    assert (last.decode_s or in_lanes_s) == pytest.approx(expected_s, rel=1e-9)
    assert last.policy.gpu_batch_size == report["gpu_batch_size"]
    assert to_json(last.policy.weights) == report["weights"]
    calibrated = HardwareProfile.load(kept / "calibrated.json")
    assert [record.source for record in calibrated.calibrations] == ["runs.csv"]


def test_broken_kept_runs_are_skipped(
    desk: Desk, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is named: here while too few are left, and by the fit, which goes on without them."""
    fitted: list[str] = []

    def fit_here(name: str, *words: str) -> bool:
        fitted.append(name)
        calibrate.main(list(words))
        return True

    monkeypatch.setattr(machine_profile, "_run_module", fit_here)
    monkeypatch.setattr(machine_profile, "SHORTEST_S", 0.0)
    monkeypatch.setattr(machine_profile, "LEAST_RUNS", 2)
    assert desk.generate("--gen-len", GEN_LEN, policy=False).status == 0
    table = kept / "runs.csv"
    header, line = table.read_text().splitlines()
    cells = line.split(",")
    cells[header.split(",").index("cache_gpu")] = "1.0"
    wrong = ",".join(cells)
    table.write_text("\n".join([header, line[:50], line, wrong]) + "\n")
    named = [f"skipped: runs {table}, line {number}: " for number in (2, 4)]
    assert desk.generate("--gen-len", GEN_LEN, policy=False).status == 0
    assert [any(name in message for message in caplog.messages) for name in named] == [True] * 2
    assert not fitted
    caplog.clear()
    ended = desk.generate("--gen-len", GEN_LEN, policy=False)
    assert ended.status == 0 and fitted == ["costmodel.calibrate"]
    assert [any(name in message for message in caplog.messages) for name in named] == [True] * 2
    assert "; calibrated by runs.csv" in ended.err


def test_runs_with_another_profile_are_not_kept(
    desk: Desk, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_profile, "SHORTEST_S", 0.0)
    flags = ("--hardware", "cpu-2core", "--gen-len", GEN_LEN)
    assert desk.generate(*flags, policy=False).status == 0
    assert not (kept / "runs.csv").exists()


def test_sampling_repeats_with_its_seed(desk: Desk) -> None:
    desk.write_policy()
    drawn = []
    for seed in (1, 1, 2):
        assert desk.generate("--temperature=1.5", "--top-k=50", f"--seed={seed}").status == 0
        drawn.append([output["output_ids"] for output in desk.outputs()])
    assert drawn[0] == drawn[1] != drawn[2]


# What is done to a desk before the command, what is told, and more flags.
Mischief = Callable[[Desk], None]


def first_shard(desk: Desk) -> Path:
    return min(desk.model.glob("*.safetensors"))


def shorten_shard(desk: Desk) -> None:
    first_shard(desk).write_bytes(first_shard(desk).read_bytes()[:-100])


def widen_config(desk: Desk) -> None:
    path = desk.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 113}))


def unknown_family(desk: Desk) -> None:
    path = desk.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))


def leave_folder(desk: Desk) -> None:
    path = desk.model / INDEX_NAME
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../model/" + index["weight_map"][name]
    path.write_text(json.dumps(index))


def other_model(desk: Desk) -> None:
    policy = desk.write_policy()
    (layer,) = policy.model.layer_kinds
    assert layer.mlp is not None
    wider = replace(layer, mlp=replace(layer.mlp, size=224))
    replace(policy, model=replace(policy.model, layer_kinds=(wider,))).save(desk.policy)


def bad_fractions(desk: Desk) -> None:
    policy = json.loads(desk.policy.read_text())
    policy["cache"] |= {"cpu": 0.5, "disk": 0.4}
    desk.policy.write_text(json.dumps(policy))


def small_budget(desk: Desk) -> None:
    desk.write_policy(hardware=HARDWARE.with_budget(cpu_memory=MIB))


def offload_is_a_file(desk: Desk) -> None:
    desk.write_policy(cache=ON_DISK)
    desk.offload.rmdir()
    desk.offload.write_text("")


def offload_below_a_file(desk: Desk) -> None:
    desk.write_policy(weights=ON_DISK)
    desk.offload.rmdir()
    (desk.offload.parent / "file").write_text("")
    desk.offload = desk.offload.parent / "file" / "folder"


def put_prompts(text: str) -> Mischief:
    def put(desk: Desk) -> None:
        desk.prompts.write_text(text)

    return put


def break_policy(desk: Desk) -> None:
    desk.policy.write_text("{")


REFUSALS: dict[str, tuple[Mischief, tuple[str, ...]]] = {
    "shard missing": (lambda desk: first_shard(desk).unlink(), ("shard model-00001", "no such")),
    "shard short": (shorten_shard, ("shard model-00001", "bytes")),
    "tensor shape": (widen_config, ("mlp", "shape [112", "[113")),
    "family": (unknown_family, ("mamba", "llama")),
    "weight map": (leave_folder, ("'../model/model-0000", "own folder")),
    "no model": (lambda desk: shutil.rmtree(desk.model), ("model", "no such folder")),
    "other model": (other_model, ("policy for another model", "layer_kinds.0.mlp.size 224", "112")),
    "no policy": (lambda desk: desk.policy.unlink(), ("policy", "no such file")),
    "policy not JSON": (break_policy, ("policy", "not JSON")),
    "fractions": (bad_fractions, ("cache", "sum to 1")),
    "no prompts file": (lambda desk: desk.prompts.unlink(), ("prompts", "No such file")),
    "empty file": (put_prompts(""), ("no prompts",)),
    "blank lines": (put_prompts("\n \n"), ("no prompts",)),
    "empty text": (put_prompts('{"prompt": "w1"}\n{"prompt": ""}\n'), ("line 2", "empty prompt")),
    "empty ids": (put_prompts('{"prompt_ids": []}'), ("line 1", "empty prompt")),
    "no tokens": (put_prompts('{"prompt": "  "}'), ("line 1", "empty prompt")),
    "too long": (put_prompts('{"prompt_ids": ' + str([1] * 95) + "}"), ("95 tokens", "96")),
    "longer than planned": (put_prompts('{"prompt_ids": ' + str([1] * 9) + "}"), ("9 tok", "8")),
    "outside": (put_prompts('{"prompt_ids": [172, 173]}'), ("token id 173", "0 to 172")),
    "not JSON": (put_prompts("w1 w2\n"), ("line 1", "not JSON")),
    "offload is a file": (offload_is_a_file, ("--offload-dir",)),
    "offload below a file": (offload_below_a_file, ("--offload-dir", "Not a directory")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line(desk: Desk, case: str) -> None:
    mischief, words = REFUSALS[case]
    desk.write_policy()
    mischief(desk)
    desk.check_refused(desk.generate("--strict"), 2, *words)


@pytest.mark.parametrize(
    "flags",
    [
        ("--temperature=-1",),
        ("--temperature=nan",),
        ("--top-p=0",),
        ("--top-k=5",),
        ("--gen-len=3",),
        ("--cpu-memory=1GiB",),
        ("--seed=-1",),
        ("--nonsense",),
        ("--hardware=nowhere.json",),
        ("--output=/nowhere/outputs.jsonl",),
        ("--trace=/nowhere/trace.json",),
    ],
)
def test_bad_flags_are_one_line(desk: Desk, flags: tuple[str, ...]) -> None:
    desk.write_policy()
    name = flags[0].partition("=")[0].removeprefix("--")
    name = "profile" if name == "hardware" else name
    desk.check_refused(desk.generate(*flags), 2, name)


def test_outputs_never_replace_the_prompts_or_a_folder(desk: Desk) -> None:
    desk.write_policy()
    before = desk.prompts.read_bytes()
    desk.check_refused(desk.generate("--output", desk.prompts), 2, "another file")
    assert desk.prompts.read_bytes() == before
    desk.check_refused(desk.generate("--output", desk.results), 2, "got a folder")


def test_a_policy_that_does_not_fit_is_refused(desk: Desk) -> None:
    small_budget(desk)
    desk.check_refused(desk.generate(), 3, "cpu is short by", "search again")


def test_nothing_fits(desk: Desk) -> None:
    flags = ("--hardware", desk.profile, "--cpu-memory=4MiB", "--disk=1GiB")
    desk.check_refused(desk.generate(*flags, policy=False), 3, "cpu", "--cpu-memory")


@pytest.mark.parametrize(
    "on_disk", [{"weights": ON_DISK}, {"cache": ON_DISK}, {"activations": ON_DISK}]
)
def test_too_small_a_disk_is_told_before_any_work(
    desk: Desk, on_disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(9, 9, 5000))
    monkeypatch.setattr(Checkpoint, "read_range", lambda *_: pytest.fail("a weight was read"))
    desk.write_policy(**on_disk)
    desk.check_refused(desk.generate(), 2, "--offload-dir", "free", "at least")


@pytest.mark.parametrize("method", ["read_into", "write_from"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_disk_that_fails_ends_the_run(
    desk: Desk, method: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(file: ScratchFile, buffer: object, position: int) -> None:
        calls.append(position)
        raise RunError("the disk is full")

    monkeypatch.setattr(ScratchFile, method, fail)
    hardware = make_hardware(gpu=gpu)
    desk.write_policy(hardware=hardware, cache=ON_DISK, activations=ON_DISK, num_gpu_batches=1)
    ended = desk.generate()
    assert ended.status == 1
    assert ended.err == "0 of 5 prompts were finished\nerror: the disk is full\n"
    assert len(calls) == 1
    assert list(desk.results.iterdir()) == list(desk.offload.iterdir()) == []


def test_weights_that_cannot_be_read_end_the_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RunError("read of weights: Input/output error")

    monkeypatch.setattr(WeightFile, "read", fail)
    desk.write_policy(weights=ON_DISK)
    ended = desk.generate()
    assert ended.status == 1
    lines = ended.err.splitlines()
    assert lines == [
        "0 of 5 prompts were finished",
        "error: read of weights: Input/output error",
    ]
    assert list(desk.results.iterdir()) == []


def test_a_late_failure_keeps_what_was_finished(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, blocks = Block.start, []

    def start(block: Block, batches: Any) -> None:
        blocks.append(batches)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        original(block, batches)

    monkeypatch.setattr(Block, "start", start)
    desk.write_policy(gpu_batch_size=1, prefill_batch_size=1, cache=ON_DISK, weights=ON_DISK)
    ended = desk.generate()
    assert ended.status == 130
    note = f"4 of 5 prompts were finished, kept in {desk.output}; --resume goes on"
    assert ended.err.splitlines() == [note, "error: interrupted"]
    # The longest prompts go first; the shortest was still to come.
    expected = dict(zip(map(tuple, PROMPTS), desk.expected(), strict=True))
    found = {tuple(output["prompt_ids"]): output["output_ids"] for output in desk.outputs()}
    assert found == {prompt: ids for prompt, ids in expected.items() if prompt != (12,)}
    assert set(desk.results.iterdir()) == {desk.output, journal_path(desk.output)}
    assert {path.suffix for path in desk.offload.iterdir()} == {".bin", ".json"}


def test_an_interrupt_while_loading_leaves_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "read_range", interrupt)
    desk.write_policy(weights=ON_DISK, cache=ON_DISK)
    ended = desk.generate()
    assert ended.status == 130
    assert ended.err == "0 of 5 prompts were finished\nerror: interrupted\n"
    assert list(desk.results.iterdir()) == list(desk.offload.iterdir()) == []


def test_ctrl_c_ends_a_process_cleanly(desk: Desk) -> None:
    """Behind a link so slow that a block takes some seconds, so that the signal comes midway."""
    slow = with_emulated_gpu(HARDWARE, memory_bytes=256 * MIB, link_bytes_per_s=6e5)
    desk.write_policy(
        hardware=slow,
        gpu_batch_size=1,
        num_gpu_batches=1,
        prefill_batch_size=1,
        weights=ON_CPU,
        cache=ON_DISK,
    )
    command = [sys.executable, "-m", "executor.generate", *desk.arguments()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not desk.output.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    note, error = err.splitlines()
    count = len(desk.outputs())
    assert 1 <= count < len(PROMPTS)
    assert note == f"{count} of 5 prompts were finished, kept in {desk.output}; --resume goes on"
    assert error == "error: interrupted"
    assert set(desk.results.iterdir()) == {desk.output, journal_path(desk.output)}
    assert list(desk.offload.iterdir()) == []


def test_infeasible_budgets_say_what_would_do(desk: Desk) -> None:
    """The figure in the message is enough: with it, the same command runs."""
    flags = ["--hardware", desk.profile, "--gen-len", GEN_LEN]
    refused = desk.generate(*flags, "--cpu-memory=8MiB", policy=False)
    desk.check_refused(refused, InfeasibleError.exit_status, "--cpu-memory")
    size = refused.err.split("--cpu-memory")[1].split()[0].strip(";,.")
    ended = desk.generate(*flags, f"--cpu-memory={size}", policy=False)
    assert ended.status == 0, ended.err
