"""Budgets watched: what is not there is refused at the start, what grows too much on the way."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from costmodel.plan.policy import Policy
from costmodel.pricing.price import estimate
from costmodel.schedule.tasks import Task
from executor.checkpoint.dummy import DummyCheckpoint
from executor.machine import memory_budget, memory_watch, offload_folder
from executor.machine.allocator import keep_freed_memory, return_freed_memory
from executor.machine.memory_budget import check_available, within_free_memory
from executor.machine.memory_watch import MemoryWatch, out_of_memory_told
from executor.run.block import Block
from executor.run.runner import Runner
from profiles import memory_limits
from profiles.errors import InfeasibleError, RunError
from profiles.hardware import HardwareProfile
from profiles.memory_limits import Held, held_memory
from profiles.units import GIB, KIB, MIB
from tests.executor.test_memory import LLAMA
from tests.executor.tiny_machines import ON_DISK, change_policy, make_hardware, make_policy

# Far more than whatever else this process may give back meanwhile.
LEAK_BYTES = 128 * MIB
POLICY = make_policy(LLAMA, prompt_len=11, gen_len=5)


def with_cpu_memory(hardware: HardwareProfile, num_bytes: int) -> HardwareProfile:
    return hardware.with_budget(cpu_memory=num_bytes)


def real_gpu(num_bytes: int) -> HardwareProfile:
    emulated = make_hardware(gpu=True)
    assert emulated.gpu is not None
    return replace(emulated, gpu=replace(emulated.gpu, emulated=False, memory_bytes=num_bytes))


def test_what_a_process_held_before_is_not_counted() -> None:
    # Else the leak fits into what other tests have freed.
    return_freed_memory()
    watch = MemoryWatch(with_cpu_memory(make_hardware(), 64 * MIB))
    watch.check()
    kept = b"\1" * LEAK_BYTES
    with pytest.raises(RunError, match=r"^cpu memory: the process holds .*--cpu-memory.*$"):
        watch.check()
    del kept


def test_a_process_that_began_small_keeps_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = make_hardware()
    hardware = replace(hardware, cpu=replace(hardware.cpu, runtime_bytes=GIB, memory_bytes=2 * GIB))
    held = [GIB // 2]
    monkeypatch.setattr(memory_watch, "held_memory", lambda: Held(0, held[-1], 0, 0))
    watch = MemoryWatch(hardware)
    held.append(2 * GIB + GIB // 20)
    watch.check()
    held.append(2 * GIB + GIB // 10)
    with pytest.raises(RunError):
        watch.check()


def test_memory_that_is_free_but_not_given_back_is_no_failure() -> None:
    keep_freed_memory()
    watch = MemoryWatch(with_cpu_memory(make_hardware(), 16 * MIB))
    # The last one stays, so that the heap cannot shrink.
    kept = [bytearray(b"\1" * (64 * KIB)) for _ in range(LEAK_BYTES // (64 * KIB))]
    del kept[:-1]
    watch.check()


def test_both_tiers_of_an_emulated_gpu_count() -> None:
    hardware = make_hardware(gpu=True)
    assert hardware.gpu is not None
    assert MemoryWatch(hardware).budget_bytes == (
        hardware.cpu.memory_bytes + hardware.gpu.memory_bytes
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_that_grows_ends_in_one_line(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An earlier test may have left a model open.
    before = set(threading.enumerate())
    policy = replace(POLICY, cpu_attention=0.0 if gpu else 1.0)
    hardware = fitting(policy, make_hardware(gpu=gpu))
    compute, leak = Block.compute, list[bytes]()

    def leaking(self: Block, task: Task) -> int:
        leak.append(b"\1" * LEAK_BYTES)
        return compute(self, task)

    monkeypatch.setattr(Block, "compute", leaking)
    source = DummyCheckpoint(spec=LLAMA)
    with Runner(policy, hardware, source, tmp_path) as runner, pytest.raises(RunError) as caught:
        list(runner.run([[1] * 11] * policy.block_size))
    assert "\n" not in str(caught.value)
    assert "cpu memory" in str(caught.value)
    assert len(leak) <= 3
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"cpu_compute", "gpu_compute"}


def fitting(policy: Policy, hardware: HardwareProfile) -> HardwareProfile:
    peaks = estimate(policy, hardware).peak_bytes
    return hardware.with_budget(cpu_memory=peaks["cpu"], gpu_memory=peaks.get("gpu"))


def test_memory_that_others_hold_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A policy with a block too large for what is left, made when there was more.
    policy = replace(POLICY, num_gpu_batches=100_000)
    hardware = with_cpu_memory(make_hardware(), 64 * GIB)
    needed = estimate(policy, hardware).peak_bytes["cpu"]
    own = held_memory().private
    assert needed > 2 * own

    def offer(num_bytes: int) -> None:
        memory = SimpleNamespace(total=64 * GIB, available=num_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    groups = list[int]()
    monkeypatch.setattr(memory_limits, "_free_in_groups", lambda root: groups)
    offer(needed)
    check_available(policy, hardware)
    offer(needed - 2 * own)
    with pytest.raises(InfeasibleError, match=r"does not fit now: .*--cpu-memory \d+MiB$"):
        Runner(policy, hardware, DummyCheckpoint(spec=LLAMA), tmp_path).__enter__()
    offer(needed)
    groups.append(needed - 2 * own)
    with pytest.raises(InfeasibleError):
        check_available(policy, hardware)


def test_an_offload_folder_in_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = change_policy(POLICY, weights=ON_DISK)
    hardware = make_hardware()
    peaks = estimate(policy, hardware).peak_bytes
    source, prompts = DummyCheckpoint(spec=LLAMA), [[1] * 11]
    usable = [peaks["cpu"] + peaks["disk"] - 1]
    monkeypatch.setattr(memory_budget, "usable_memory_bytes", lambda runtime_bytes: usable[0])
    with Runner(policy, hardware, source, tmp_path / "disk"):
        assert "in memory" not in caplog.text
    monkeypatch.setattr(offload_folder, "memory_file_system", lambda folder: "tmpfs")
    with pytest.raises(InfeasibleError, match="for files in memory"):
        Runner(policy, hardware, source, tmp_path / "memory").__enter__()
    usable[0] += 1
    with Runner(policy, hardware, source, tmp_path / "memory") as runner:
        first = [block.output_ids for block in runner.run(prompts)]
    assert "in memory (tmpfs)" in caplog.text
    # What an earlier run has written there is held already.
    usable[0] -= peaks["disk"] // 2
    with Runner(policy, hardware, source, tmp_path / "memory") as runner:
        assert [block.output_ids for block in runner.run(prompts)] == first


def test_budgets_of_a_search_are_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = make_hardware(disk_bytes=3 * GIB)
    free = [5 * GIB]
    monkeypatch.setattr(memory_budget, "usable_memory_bytes", lambda runtime_bytes: free[0])
    assert within_free_memory(hardware, tmp_path) == hardware
    assert capsys.readouterr().err == ""
    free[0] = GIB
    lowered = within_free_memory(hardware, tmp_path, is_asked_for=True)
    assert (lowered.cpu.memory_bytes, lowered.disk.free_bytes) == (GIB, 3 * GIB)
    assert "of --cpu-memory 4.00 GiB" in capsys.readouterr().err
    monkeypatch.setattr(memory_budget, "memory_file_system", lambda folder: "tmpfs")
    for free[0], disk in ((GIB, 0), (6 * GIB, 2 * GIB), (9 * GIB, 3 * GIB)):
        assert within_free_memory(hardware, tmp_path).disk.free_bytes == disk
    # An emulated GPU is CPU memory, too.
    free[0] = 4 * GIB
    emulated = make_hardware(gpu=True)
    assert within_free_memory(emulated, tmp_path).cpu.memory_bytes == 3 * GIB


def test_cuda_is_capped_while_a_run_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with MemoryWatch(real_gpu(4 * GIB)):
        assert fractions == [pytest.approx(0.5 * 1.03)]
    assert fractions[1:] == [1.0]
    fractions.clear()
    with MemoryWatch(real_gpu(8 * GIB)), MemoryWatch(make_hardware(gpu=True)):
        assert fractions == [1.0]


def test_cuda_out_of_memory_is_one_line() -> None:
    with pytest.raises(RunError) as caught, out_of_memory_told(real_gpu(GIB)):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    assert str(caught.value).startswith(
        "gpu memory: the run needs more than its budget of 1.00 GiB"
    )


@pytest.mark.gpu
def test_cuda_refuses_more_than_the_budget() -> None:
    torch.cuda.empty_cache()
    hardware = real_gpu(64 * MIB)
    with pytest.raises(RunError), out_of_memory_told(hardware), MemoryWatch(hardware):
        torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
