"""The tiers and channels of the machine that a policy runs on."""

from __future__ import annotations

from functools import cache

import torch

from executor.arena import Arena
from executor.engine import Channel, Throttle
from profiles.hardware import HardwareProfile
from profiles.kernels import without_cudnn_attention

# One thread of so many feeds the GPU while the others attend.
FEEDING_SHARE = 8


@cache
def _stream(channel: str) -> torch.cuda.Stream:
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
        self.uses_cuda = hardware.has_gpu and not hardware.is_emulated
        cpu = torch.device("cpu")
        device = torch.device("cuda") if self.uses_cuda else cpu
        # What the process holds before it loads anything is part of the budget.
        budget = hardware.cpu.memory_bytes - hardware.cpu.runtime_bytes
        self.cpu = Arena("cpu", budget, cpu, pins=self.uses_cuda)
        self.compute = self.cpu
        if self.uses_cuda:
            without_cudnn_attention()
        if hardware.gpu is not None:
            self.compute = Arena("gpu", hardware.gpu.memory_bytes, device)

    @property
    def arenas(self) -> dict[str, Arena]:
        """The arenas by tier."""
        return {"cpu": self.cpu, "gpu": self.compute} if self.has_gpu else {"cpu": self.cpu}

    def make_channels(self, *, attends_on_cpu: bool) -> list[Channel]:
        """Make one channel for each that the schedule may use.

        An emulated GPU computes on the CPU's cores. Where the CPU attends beside it, in decode,
        each has half of them: two teams of threads on the same cores wait for each other's turns.
        Beside a real one, the CPU's attention leaves some to the threads that feed the GPU.
        """
        gpu = self.hardware.gpu
        num_threads = torch.get_num_threads()
        cpu_threads = gpu_threads = None
        if gpu is not None and attends_on_cpu:
            gpu_threads = num_threads // 2 if gpu.emulated else num_threads // FEEDING_SHARE
            cpu_threads, gpu_threads = num_threads - gpu_threads, max(1, gpu_threads)
        channels = [
            Channel("disk_read"),
            Channel("disk_write"),
            Channel("cpu_compute", decode_threads=cpu_threads),
        ]
        if gpu is None:
            return channels
        rates = {"h2d": gpu.h2d.pinned_bytes_per_s, "d2h": gpu.d2h.pinned_bytes_per_s}
        for name in ("h2d", "d2h", "gpu_compute"):
            stream = _stream(name) if self.uses_cuda else None
            throttle = Throttle(rates[name]) if gpu.emulated and name in rates else None
            channels.append(
                Channel(name, stream=stream, throttle=throttle, decode_threads=gpu_threads)
            )
        return channels

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu.__exit__()
