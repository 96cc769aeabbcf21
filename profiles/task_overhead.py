"""The fixed cost of a computing task."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from profiles import kernels
from profiles.cores import kept_busy
from profiles.repeats import Repeater

# A layer so small that its arithmetic takes no time, and wide enough for operators to call all
# threads, which takes some.
SEQUENCES, HEADS, HEAD_DIM = 2, 2, 128
HIDDEN = HEADS * HEAD_DIM
CONTEXT = 4
# A run's layer has more Python around its operators: views, checks, the span of its task. Models
# with layers as small as this one took 2.1 to 2.5 times as long for each on a CPU, in lockstep and
# over lanes. On a GPU this was not measured.
CPU_RUN_FACTOR = 2.2


def measure_task_overhead(
    device: str, name: str, repeater: Repeater, beside: Callable[[], object] | None = None
) -> float:
    """Measure the seconds that computing a layer costs beside its arithmetic.

    It is handed to a thread, and launches its operators, as in a run: where the CPU attends for a
    GPU, while it does so (``beside``).
    """
    tasks: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
    layer = _SmallLayer.on(device)
    failures: list[Exception] = []

    def work_off() -> None:
        with torch.inference_mode():
            while (done := tasks.get()) is not None:
                try:
                    layer.launch()
                    if device != "cpu":
                        torch.cuda.synchronize()
                except Exception as error:
                    failures.append(error)
                done.set()

    def hand_over() -> None:
        done = threading.Event()
        tasks.put(done)
        done.wait()
        if failures:
            raise failures[0]

    worker = threading.Thread(target=work_off, name="task-overhead")
    worker.start()
    # As in a run, where this thread hands out tasks and computes nothing.
    kernels.end_idle_threads()
    try:
        with kept_busy(beside) if beside else nullcontext():
            factor = CPU_RUN_FACTOR if device == "cpu" else 1.0
            return factor * repeater.measure_seconds(name, hand_over).median
    finally:
        tasks.put(None)
        worker.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class _SmallLayer:
    """About the operators of one decoder layer: norms, rotation, attention, products."""

    x: torch.Tensor
    matrix: torch.Tensor
    stacked: torch.Tensor
    vector: torch.Tensor
    angles: torch.Tensor
    cache: torch.Tensor

    @classmethod
    def on(cls, device: str) -> _SmallLayer:
        def ones(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)

        return cls(
            x=ones(SEQUENCES, HIDDEN),
            matrix=ones(HIDDEN, HIDDEN),
            stacked=ones(3 * HIDDEN, HIDDEN),
            vector=ones(HIDDEN),
            angles=ones(SEQUENCES, HEAD_DIM // 2),
            cache=ones(CONTEXT, 2, SEQUENCES * HEADS, HEAD_DIM),
        )

    def launch(self) -> None:
        heads = kernels.linear(self._normed(), self.stacked).view(SEQUENCES, 3 * HEADS, HEAD_DIM)
        kernels.rotate(heads[:, : 2 * HEADS], self.angles, self.angles)
        keys_values = heads[:, HEADS:].unflatten(1, (2, HEADS)).transpose(0, 1)
        self.cache[-1].copy_(keys_values.flatten(1, 2))
        attended = heads.new_empty(SEQUENCES * HEADS, 1, HEAD_DIM)
        kernels.decode_attention(heads[:, :HEADS], self.cache, attended)
        kernels.linear(attended.view(SEQUENCES, HIDDEN), self.matrix, None, self.x, adds=True)
        normed = self._normed()
        gate, up = kernels.linear(normed, self.matrix), kernels.linear(normed, self.matrix)
        kernels.swiglu(gate, up)
        kernels.linear(gate, self.matrix, None, self.x, adds=True)

    def _normed(self) -> torch.Tensor:
        out = torch.empty_like(self.x)
        kernels.rms_norm(self.x[:, None], self.vector, 1e-5, out[:, None])
        return out
