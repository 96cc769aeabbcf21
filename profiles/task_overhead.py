"""The fixed cost of a computing task."""

from __future__ import annotations

import queue
import threading

import torch
import torch.nn.functional as F

from profiles.sampling import Sampler

# Width of tensors that cost nothing to compute with.
TINY = 16


def measure_task_overhead(device: str, name: str, sampler: Sampler) -> float:
    """Measure the seconds that computing a layer costs beside its arithmetic.

    It is handed to a thread, and launches its operators, here on tensors too small to take time
    themselves.
    """
    tasks: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
    x = torch.ones(1, 1, TINY, device=device)
    weight = torch.ones(TINY, TINY, device=device)

    def work_off() -> None:
        with torch.inference_mode():
            while (done := tasks.get()) is not None:
                _launch_layer(x, weight)
                if device != "cpu":
                    torch.cuda.synchronize()
                done.set()

    def hand_over() -> None:
        done = threading.Event()
        tasks.put(done)
        done.wait()

    worker = threading.Thread(target=work_off, name="task-overhead")
    worker.start()
    try:
        return sampler.measure_seconds(name, hand_over).median
    finally:
        tasks.put(None)
        worker.join()


def _launch_layer(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Launch about the operators of one decoder layer: norms, rotation, attention, products."""
    for _ in range(2):
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1.0)).mul_(weight[0])
    query, key, value = (F.linear(x, weight) for _ in range(3))
    for heads in (query, key):
        left, right = heads.chunk(2, dim=-1)
        rotated = left * weight[0, :1], right * weight[0, :1]
        left.mul_(2.0).sub_(rotated[1])
        right.mul_(2.0).add_(rotated[0])
    cache = weight.clone()
    cache[0].copy_(key[0, 0])
    cache[1].copy_(value[0, 0])
    attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
    x = x + F.linear(attended[:, 0], weight)
    gate, up = F.linear(x, weight), F.linear(x, weight)
    x.add_(F.linear(F.silu(gate).mul_(up), weight))
