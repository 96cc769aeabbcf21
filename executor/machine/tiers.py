"""The tiers and channels of the machine that a policy runs on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache

import torch

from executor.engine.channels import Channel, Throttle
from executor.machine.arena import Arena
from profiles.cores import attending_threads, feeding_threads
from profiles.hardware import HardwareProfile
from profiles.kernels import without_cudnn_attention


@cache
def _stream_of(channel: str) -> torch.cuda.Stream:
    """Return the process's stream of a channel: cuBLAS keeps a workspace, of 32 MiB on some GPUs,
    for every stream that it ever worked on."""
    return torch.cuda.Stream()


class Machine:
    """Arenas and channels, real or emulated, by what the profile says. A context manager.

    ``compute`` is the arena of the device that computes: the GPU's where there is one, else the
    CPU's. An emulated GPU is a second arena in CPU memory behind throttled links.
    """

    def __init__(self, hardware: HardwareProfile) -> None:
        self.hardware = hardware
        self.has_gpu = hardware.has_gpu
        self.uses_cuda = hardware.uses_cuda
        cpu = torch.device("cpu")
        device = torch.device("cuda") if self.uses_cuda else cpu
        # What the process holds before it loads anything is part of the budget.
        budget = hardware.cpu.memory_bytes - hardware.cpu.runtime_bytes
        self._stack = ExitStack()
        self.cpu = self._stack.enter_context(Arena("cpu", budget, cpu, pins=self.uses_cuda))
        self.compute = self.cpu
        if self.uses_cuda:
            without_cudnn_attention()
        if hardware.gpu is not None:
            self.compute = Arena("gpu", hardware.gpu.memory_bytes, device)

    @property
    def arenas(self) -> dict[str, Arena]:
        """The arenas by tier."""
        return {"cpu": self.cpu, "gpu": self.compute} if self.has_gpu else {"cpu": self.cpu}

    def make_channels(self, *, shares_cores: bool) -> list[Channel]:
        """Make one channel for each that the schedule may use.

        ``shares_cores`` says whether the CPU computes beside a GPU: it attends, or multiplies
        experts in place. An emulated GPU computes on the CPU's cores. There they take turns, unless
        the profile says that both at once compute more: two teams of threads on the same cores wait
        for each other in the middle of their work. Beside a real one, the CPU leaves some to the
        threads that feed the GPU. Links are copies, which want no team of threads: every team
        beyond the cores slows down all (see ``kernels.end_idle_threads``).
        """
        gpu = self.hardware.gpu
        cores = cpu_threads = gpu_threads = None
        if shares_cores and self.uses_cuda:
            num_threads = torch.get_num_threads()
            gpu_threads = feeding_threads(num_threads)
            cpu_threads = attending_threads(num_threads)
        elif shares_cores and self._takes_turns:
            cores = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="cores"))
        channels = [
            Channel("disk_read"),
            Channel("disk_write"),
            Channel("cpu_compute", num_threads=cpu_threads, cores=cores),
        ]
        if gpu is None:
            return channels
        compute = Channel(
            "gpu_compute", stream=self._stream("gpu_compute"), num_threads=gpu_threads, cores=cores
        )
        links = [
            Channel(
                name,
                stream=self._stream(name),
                num_threads=1,
                throttle=Throttle(link.pinned_bytes_per_s) if gpu.emulated else None,
            )
            for name, link in (("h2d", gpu.h2d), ("d2h", gpu.d2h))
        ]
        return [*channels, *links, compute]

    @property
    def _takes_turns(self) -> bool:
        """Whether an emulated GPU and the CPU compute no more at once than in turns."""
        computing = {"gpu_compute", "cpu_compute"}
        return self.hardware.is_emulated and not any(
            pair.first_keeps + pair.second_keeps > 1
            for pair in self.hardware.contention
            if {pair.first, pair.second} == computing
        )

    def _stream(self, channel: str) -> torch.cuda.Stream | None:
        return _stream_of(channel) if self.uses_cuda else None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
