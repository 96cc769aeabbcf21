"""Whatever breaks: a clear error, no hang, nothing left behind, and right tokens ever after."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.layout import model_layers
from costmodel.plan.plan import Plan
from costmodel.plan.policy import Placement, Policy
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.stored_tensors import SINGLE_NAME
from executor.engine.channels import Handler
from executor.jobs.answers import AnswerFile
from executor.jobs.journal import Journal, journal_path
from executor.machine.offload_folder import remove_orphans
from executor.run.block import Block
from executor.stores.weight_file import WeightFile
from profiles.errors import RunError
from profiles.units import MIB
from tests.executor.faults import (
    Command,
    Ended,
    Fault,
    is_broken,
    is_full,
    kill,
    limit_files,
    terminate,
)
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    Case,
    change_policy,
    make_hardware,
    make_policy,
)
from tests.executor.tiny_models import save_tiny_model

pytestmark = pytest.mark.timeout(60)

GEN_LEN = 4
PROMPTS = [[5, 9, 170, 3], [88, 1, 2, 3, 4, 5], [33, 34, 35], [9, 8, 7], [12, 13]]
PROMPT_LEN = max(map(len, PROMPTS))
MACHINES = {"cpu": make_hardware(), "gpu": make_hardware(gpu=True)}
HALVES = Placement(cpu=0.5, disk=0.5)
ALL_ON_DISK = {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_DISK}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene(Case):
    """A case with the right tokens, and a folder for what commands write."""

    model: Path
    root: Path
    tokens: list[list[int]]

    def policy(self, **changes: Any) -> Policy:
        base = make_policy(self.source.spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
        return change_policy(base, **changes)

    def open_weights(self) -> WeightFile:
        """Open the file of the weights, to find places in it."""
        return WeightFile(self.folder, self.source, model_layers(self.source.spec))

    def check(self, policy: Policy, machine: str = "cpu") -> None:
        """Run undisturbed: right tokens, and only a finished weight file stays."""
        assert self.generate(policy, MACHINES[machine]) == self.tokens
        self.check_clean(RUN_SUFFIXES if policy.weights["head"].disk else set())

    def check_clean(self, suffixes: set[str]) -> None:
        """Nothing is there but weight files, and no worker lives."""
        names = {path.name for path in self.folder.iterdir()}
        assert {Path(name).suffix for name in names} == suffixes
        assert not any(name.startswith(".") for name in names)
        channels = {"disk_read", "disk_write", "cpu_compute", "gpu_compute", "h2d", "d2h"}
        alive = {thread.name for thread in threading.enumerate()}
        assert not alive & channels
        assert not any(name.startswith("aligned-io") for name in alive)

    def weight_file(self) -> Path:
        (path,) = self.folder.glob("*.bin")
        return path

    def fails(self, policy: Policy, machine: str = "cpu") -> str:
        """Run into an error and return its one line."""
        with pytest.raises(RunError) as caught:
            self.generate(policy, MACHINES[machine])
        assert "\n" not in str(caught.value)
        return str(caught.value)


RUN_SUFFIXES = {".bin", ".json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama", num_layers=3)
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[list[int]]:
    return ReferenceModel(Checkpoint.open(model)).generate(PROMPTS, GEN_LEN)


@pytest.fixture
def scene(model: Path, tokens: list[list[int]], tmp_path: Path) -> Scene:
    (tmp_path / "offload").mkdir()
    return Scene(
        source=Checkpoint.open(model),
        prompts=PROMPTS,
        folder=tmp_path / "offload",
        model=model,
        root=tmp_path,
        tokens=tokens,
    )


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer without experts, then two with them."""
    folder = tmp_path_factory.mktemp("experts")
    save_tiny_model(folder, "qwen2_moe", num_layers=3, mlp_only_layers=[0])
    return folder


@pytest.fixture
def experts_scene(scene: Scene, experts_model: Path) -> Scene:
    source = Checkpoint.open(experts_model)
    tokens = ReferenceModel(source).generate(PROMPTS, GEN_LEN)
    return replace(scene, source=source, tokens=tokens)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("after", [0, 9, 40])
def test_a_disk_that_fills_up(
    scene: Scene, machine: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = scene.policy(**ALL_ON_DISK)
    scene.check(policy, machine)
    with monkeypatch.context() as patch:
        strikes = Fault(target="os:pwritev", does=is_full, after=after).arm(patch.setattr)
        assert "the disk is full" in scene.fails(policy, machine)
        assert strikes
    scene.check_clean(RUN_SUFFIXES)
    scene.check(policy, machine)


READS: dict[str, tuple[dict[str, Any], str]] = {
    "cache": ({"cache": ON_DISK}, "os:preadv"),
    "hidden states": ({"activations": ON_DISK}, "os:preadv"),
    "weights": ({"weights": ON_DISK}, "os:preadv"),
    "checksums": ({"weights": ON_DISK}, "os:pread"),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("after", [0, 3, 12])
@pytest.mark.parametrize("what", READS)
def test_a_read_error(
    scene: Scene, what: str, after: int, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement, target = READS[what]
    policy = scene.policy(**placement)
    scene.check(policy, machine)
    before = {path: path.stat().st_mtime_ns for path in scene.folder.iterdir()}
    with monkeypatch.context() as patch:
        # Weights in memory are read by the same call, before.
        strikes = Fault(target=target, does=is_broken, after=after).arm(
            lambda owner, name, value: _arm_later(patch, owner, name, value)
        )
        line = scene.fails(policy, machine)
        assert strikes
        assert "Input/output error" in line and str(scene.folder) in line
    # A disk that could not be read for a moment says nothing against the file.
    assert {path: path.stat().st_mtime_ns for path in scene.folder.iterdir()} == before
    scene.check(policy, machine)


def _arm_later(patch: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> None:
    """Replace something once everything is loaded."""
    original = Block.start

    def start(block: Block, batches: Any) -> None:
        patch.setattr(owner, name, value)
        original(block, batches)

    patch.setattr(Block, "start", start)


@pytest.mark.parametrize("part", [0.0, 0.4, 0.9, 0.9999])
def test_weights_cut_off_between_runs(scene: Scene, part: float) -> None:
    policy = scene.policy(weights=ON_DISK)
    scene.check(policy)
    path = scene.weight_file()
    os.truncate(path, int(path.stat().st_size * part))
    scene.check(policy)


@pytest.mark.parametrize("target", ["WeightFile.read", "WeightFile.read_row"])
@pytest.mark.parametrize("after", [0, 8])
def test_weights_cut_off_during_a_run(
    scene: Scene, target: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = scene.policy(weights=ON_DISK)
    scene.check(policy)

    def cut(file: WeightFile, *_: object) -> None:
        os.truncate(file.path, 0)

    with monkeypatch.context() as patch:
        Fault(target=f"executor.stores.weight_file:{target}", does=cut, after=after).arm(
            patch.setattr
        )
        line = scene.fails(policy)
    # The checksums may be missed before the pages are.
    assert "shorter than expected" in line or "is not what was written" in line
    assert str(scene.folder) in line
    scene.check(policy)


def flip(path: Path, position: int) -> None:
    """Change one bit of a file and nothing else about it."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))
    os.utime(path, ns=times)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("layer", range(5))
def test_a_flipped_bit_is_told_and_mended(scene: Scene, layer: int, machine: str) -> None:
    policy = scene.policy(weights=ON_DISK)
    scene.check(policy, machine)
    for component in Plan.of(policy, has_gpu=machine == "gpu").weights[layer]:
        layout = component.layout
        offset = layout.num_bytes - 1
        if layout.name == "embedding":
            # Only the rows of the prompts' tokens are read.
            (table,) = layout.tensors
            offset = table.offset_bytes + PROMPTS[0][0] * table.row_bytes
        with scene.open_weights() as file:
            flip(file.path, file.position(component, offset))
        line = scene.fails(policy, machine)
        assert f"{layout.name} of layer {layer} is not what was written" in line
        assert "built anew" in line and str(scene.weight_file()) in line
        scene.check(policy, machine)


@pytest.mark.parametrize("on_demand", [False, True])
def test_a_flipped_bit_inside_an_expert_is_told_and_mended(
    on_demand: bool, experts_scene: Scene
) -> None:
    scene = experts_scene
    policy = scene.policy(weights=ON_DISK, loads_on_demand=on_demand)
    scene.check(policy)
    # The embedding, a layer without experts, an attention, and the experts behind it.
    experts = Plan.of(policy, has_gpu=False).weights[3][-1]
    with scene.open_weights() as file:
        flip(file.path, file.position(experts, 5 * experts.layout.unit_bytes + 1000))
    assert "experts of layer 3 is not what was written" in scene.fails(policy)
    scene.check(policy)


def test_a_flipped_bit_in_a_checksum_is_told_and_mended(scene: Scene) -> None:
    policy = scene.policy(weights=ON_DISK)
    scene.check(policy)
    flip(scene.weight_file(), scene.weight_file().stat().st_size - 1)
    assert "is not what was written" in scene.fails(policy)
    scene.check(policy)


def test_a_flipped_bit_that_is_not_read_disturbs_nobody(scene: Scene) -> None:
    scene.check(scene.policy(weights=ON_DISK))
    first = Plan.of(scene.policy(), has_gpu=False).weights[2][0]
    with scene.open_weights() as file:
        flip(file.path, file.position(first, 0))
    scene.check(scene.policy(weights=HALVES))
    assert "layer 2" in scene.fails(scene.policy(weights=ON_DISK))


def test_a_checkpoint_changed_in_place_is_noticed(scene: Scene, tmp_path: Path) -> None:
    """Same name, same size, same header, another number."""
    save_tiny_model(tmp_path / "model", "llama", num_layers=3)
    shard = tmp_path / "model" / "model.safetensors"
    policy = scene.policy(weights=ON_DISK)
    for _ in range(2):
        source = Checkpoint.open(tmp_path / "model")
        tokens = ReferenceModel(source).generate(PROMPTS, GEN_LEN)
        changed = replace(scene, source=source, tokens=tokens)
        assert changed.generate(policy, MACHINES["cpu"]) == tokens
        with shard.open("r+b") as file:
            file.seek(-4 * 5000, os.SEEK_END)
            file.write(torch.ones(5000).numpy().tobytes())


@pytest.mark.parametrize("changes", [{}, {"weights": HALVES}, {"weights": ON_DISK}])
def test_a_checkpoint_replaced_after_it_was_opened_is_told(
    scene: Scene, tmp_path: Path, changes: dict[str, Placement]
) -> None:
    """Another model of the same shapes: its tensors may be in other places of the file."""
    for seed in (0, 1):
        save_tiny_model(tmp_path / str(seed), "llama", num_layers=3, seed=seed)
    opened = replace(scene, source=Checkpoint.open(tmp_path / "0"))
    (tmp_path / "1" / SINGLE_NAME).replace(tmp_path / "0" / SINGLE_NAME)
    assert "changed while it was read; try: run again" in opened.fails(scene.policy(**changes))
    opened.check_clean(set())


KINDS = {
    "cpu": (
        "read_weights",
        "read_cache",
        "write_cache",
        "read_hidden",
        "write_hidden",
        "compute",
    ),
    "gpu": (
        "read_weights",
        "send_weights",
        "read_cache",
        "send_cache",
        "return_cache",
        "write_cache",
        "read_hidden",
        "send_hidden",
        "return_hidden",
        "write_hidden",
        "compute",
        "project",
        "return_queries",
        "attend",
        "send_attended",
        "finish",
    ),
}
EXPERT_KINDS = {
    "cpu": ("route", "run_chunk", "read_experts"),
    "gpu": (
        "route",
        "read_experts",
        "send_experts",
        "return_tokens",
        "run_experts",
        "send_made",
        "combine",
    ),
}


def _by_machine(kinds: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(machine, kind) for machine, found in kinds.items() for kind in found]


def test_every_kind_of_task_is_made_to_throw(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = Block.handlers(_Anything())  # type: ignore[arg-type]  # only names are wanted
    assert {*KINDS["gpu"], *EXPERT_KINDS["cpu"], *EXPERT_KINDS["gpu"]} == set(handlers)


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return _Anything()


@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize(("machine", "kind"), _by_machine(KINDS))
def test_a_worker_that_throws(
    scene: Scene, machine: str, kind: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is attended on the CPU is not sent, so half of it is in that case.
    halves = {"cache": ON_CPU, "cpu_attention": 0.5} if kind == "send_cache" else {}
    policy = scene.policy(**(ALL_ON_DISK | {"gpu_batch_size": 3} | halves))
    _check_thrown(scene, policy, machine, kind, after, monkeypatch)


@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize(("machine", "kind"), _by_machine(EXPERT_KINDS))
def test_a_worker_that_throws_beside_experts(
    experts_scene: Scene, machine: str, kind: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = experts_scene
    policy = scene.policy(weights=HALVES, loads_on_demand=True, cpu_experts=0.5)
    _check_thrown(scene, policy, machine, kind, after, monkeypatch)


def _check_thrown(
    scene: Scene,
    policy: Policy,
    machine: str,
    kind: str,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Block.handlers
    ran = []

    def thrower(handler: Handler) -> Handler:
        def throw(task: Task) -> int:
            ran.append(task)
            if len(ran) > after:
                raise RuntimeError(f"{kind} threw")
            return handler(task)

        return throw

    with monkeypatch.context() as patch:
        patch.setattr(
            Block,
            "handlers",
            lambda block: {
                name: thrower(handler) if name == kind else handler
                for name, handler in original(block).items()
            },
        )
        with pytest.raises(RuntimeError, match=f"{kind} threw"):
            scene.generate(policy, MACHINES[machine])
        assert len(ran) == after + 1
    scene.check_clean(RUN_SUFFIXES)
    scene.check(policy, machine)


class Desk:
    """What a command reads and writes."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.results = scene.root / "results"
        self.results.mkdir()
        prompts, policy = scene.root / "prompts.jsonl", scene.root / "policy.json"
        prompts.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))
        small = {"gpu_batch_size": 1, "prefill_batch_size": 1, "hardware": MACHINES["cpu"]}
        scene.policy(**small, **ALL_ON_DISK).save(policy)
        self._inputs = {
            "model": scene.model,
            "prompts": prompts,
            "policy": policy,
            "offload-dir": scene.folder,
        }

    def start(
        self, name: str = "outputs", fault: Fault | None = None, *, resumes: bool = False
    ) -> Command:
        flags = self._inputs | {"output": self.results / f"{name}.jsonl"}
        arguments = [f"--{flag}={value}" for flag, value in flags.items()]
        arguments += ["--resume"] if resumes else []
        return Command(arguments, self.scene.root / f"{name}.log", fault)

    def run(self, fault: Fault | None = None, *, resumes: bool = False) -> Ended:
        return self.start(fault=fault, resumes=resumes).end()

    def finished(self, name: str = "outputs") -> int:
        """Count the prompts in the output file; each must have the right tokens."""
        path = self.results / f"{name}.jsonl"
        if not path.exists():
            return 0
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            index = PROMPTS.index(line["prompt_ids"])
            assert line["output_ids"] == self.scene.tokens[index]
        return len(lines)

    def check_completes(self) -> None:
        """Run undisturbed: everything right, and nothing left of what was before."""
        output, told = self.results / "outputs.jsonl", ""
        if left := journal_path(output).exists():
            # An earlier job's outputs stay until the first one of a new job.
            with AnswerFile(output, Journal.read(output)) as answers:
                told = f"{answers.num_done} of {len(PROMPTS)} prompts are answered already\n"
            left = journal_path(output).exists()
            told = told if left else ""
        assert self.run(resumes=left) == Ended(status=0, err=told)
        assert self.finished() == len(PROMPTS)
        assert [path.name for path in self.results.iterdir()] == ["outputs.jsonl"]
        self.scene.check_clean(RUN_SUFFIXES)
        assert len(list(self.scene.folder.iterdir())) == 2


@pytest.fixture
def desk(scene: Scene) -> Desk:
    return Desk(scene)


# Where a signal strikes, and how many prompts are finished by then: a block is two of them.
MOMENTS: dict[str, tuple[str, int, int]] = {
    "in the build": ("executor.checkpoint.folder:Checkpoint.read_range", 3, 0),
    "before the manifest": ("executor.stores.weight_file:write_json", 0, 0),
    "before the journal has its name": ("pathlib:Path.replace", 0, 0),
    "before the manifest has its name": ("pathlib:Path.replace", 1, 0),
    "before the first block": ("executor.run.block:Block.start", 0, 0),
    "in the first block": ("executor.stores.kv_cache:KVCache.write", 9, 0),
    "in the second block": ("executor.stores.kv_cache:KVCache.write", 34, 2),
    "in a read": ("executor.stores.weight_file:WeightFile.read", 45, 2),
    "before the journal is removed": ("executor.jobs.journal:Journal.remove", 0, 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_cleans_up_and_tells(desk: Desk, moment: str) -> None:
    target, after, finished = MOMENTS[moment]
    ended = desk.run(Fault(target=target, does=terminate, after=after))
    output = desk.results / "outputs.jsonl"
    kept = f", kept in {output}; --resume goes on" if finished else ""
    assert ended.err.splitlines() == [
        f"{finished} of {len(PROMPTS)} prompts were finished{kept}",
        "error: terminated",
    ]
    assert ended.status == 143
    assert desk.finished() == finished
    assert set(desk.results.iterdir()) == ({output, journal_path(output)} if finished else set())
    was_built = moment not in list(MOMENTS)[:4]
    desk.scene.check_clean(RUN_SUFFIXES if was_built else set())
    desk.check_completes()


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_leaves_nothing_after_the_next_start(desk: Desk, moment: str) -> None:
    target, after, finished = MOMENTS[moment]
    ended = desk.run(Fault(target=target, does=kill, after=after))
    assert ended == Ended(status=-signal.SIGKILL, err="")
    assert desk.finished() == finished
    desk.check_completes()


def test_a_killed_build_over_a_cut_file_is_not_believed(desk: Desk) -> None:
    """The old manifest would fit a file that was made as long as it should be and not filled."""
    desk.check_completes()
    os.truncate(desk.scene.weight_file(), 0)
    assert desk.run(Fault(target="os:pwritev", does=kill, after=2)).status == -signal.SIGKILL
    assert desk.scene.weight_file().stat().st_size > 0
    desk.check_completes()


def test_another_model_s_half_built_file_is_removed(
    desk: Desk, scene: Scene, tmp_path: Path
) -> None:
    desk.run(Fault(target="executor.checkpoint.folder:Checkpoint.read_range", does=kill, after=3))
    orphan = scene.weight_file()
    scene.check(scene.policy(cache=ON_DISK))
    assert not orphan.exists()


def test_a_limit_on_files_is_told(desk: Desk) -> None:
    """The kernel itself refuses to let the cache grow."""
    limit = functools.partial(limit_files, MIB // 8)
    ended = desk.run(Fault(target="executor.run.block:Block.start", does=limit))
    assert ended.status == 1
    note, error = ended.err.splitlines()
    assert note == f"0 of {len(PROMPTS)} prompts were finished"
    assert error.startswith("error: write of ") and error.endswith(": File too large")
    desk.check_completes()


def test_commands_share_a_folder(desk: Desk) -> None:
    names = [f"outputs{i}" for i in range(3)]
    commands = [desk.start(name) for name in names]
    for name, command in zip(names, commands, strict=True):
        ended = command.end()
        assert ended.status == 0, ended.err
        assert desk.finished(name) == len(PROMPTS)
    desk.scene.check_clean(RUN_SUFFIXES)


def test_a_start_takes_nothing_from_a_command_that_runs(desk: Desk, scene: Scene) -> None:
    """Orphans are looked for while another process is at every stage of its work."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            remove_orphans(scene.folder)

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        desk.check_completes()
    finally:
        stop.set()
        thread.join()
