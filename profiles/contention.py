"""How much channels slow each other down when both are busy."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from profiles.aligned_io import DirectFile
from profiles.attention_rates import decode_attention_call
from profiles.compute import matrix_product
from profiles.compute_plan import ComputePlan
from profiles.compute_rates import ComputeRates
from profiles.disk import DiskPlan, noise_file
from profiles.hardware import Contention
from profiles.links import BUFFER_BYTES, link_copy
from profiles.repeats import Repeater
from profiles.units import MIB

# Requests and threads as runs use them; calls short enough that a window holds many.
REQUEST_BYTES = 4 * MIB
NUM_THREADS = 4
DISK_PLAN = DiskPlan(
    file_bytes=128 * MIB,
    chunk_bytes=NUM_THREADS * REQUEST_BYTES,
    request_bytes=(REQUEST_BYTES,),
    depths=(NUM_THREADS,),
)
DTYPE = "bfloat16"
# As in decode that waits for a disk: few rows, whose products read memory at its full rate. Beside
# 256 rows a disk keeps more.
MAX_ROWS = 16
# A window ends when each work was done so often in it, and is meant to hold more.
MIN_CALLS = 3
WANTED_CALLS = 8
# Where two channels nearly stop each other, the ratio is mostly noise.
LEAST_KEPT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundWork:
    """What keeps a channel busy: a call that does ``amount`` of ``unit``, and waits for it."""

    channel: str
    unit: str
    amount: float
    call: Callable[[], object]


def measure_contention(
    offload_dir: Path, plan: ComputePlan, rates: ComputeRates, has_gpu: bool, repeater: Repeater
) -> tuple[Contention, ...]:
    """Measure ``cpu_compute`` beside ``disk_read``, ``disk_write`` and, with a GPU, ``h2d``.

    The CPU multiplies matrices where it is the compute device, and attends where a GPU is. A
    rate beside another channel is held against the rate alone of the same round, so that a
    drifting machine does not count; the median of the rounds is kept. The samples of all rates
    stay in the repeater's measurements.

    Parameters
    ----------
    rates
        The CPU's own, by which the work is cut.

    Raises
    ------
    InputError
        When the folder is missing, cannot be written, or has no room for the file.
    """
    cpu = _cpu_work(plan, rates, has_gpu, repeater.effort.window_s)
    with _disk_works(offload_dir) as others:
        if has_gpu:
            others.append(_h2d_work())
        repeater.announce("contention")
        rounds = [_run_round(cpu, others, repeater) for _ in range(repeater.effort.num_samples)]
    units = {work.channel: work.unit for work in (cpu, *others)}
    for channel, beside in rounds[0]:
        kind = f"beside_{beside}" if beside else "alone"
        samples = [figures[channel, beside] for figures in rounds]
        repeater.keep(f"contention.{channel}.{kind}", units[channel], samples)
    return tuple(
        Contention(
            first=other.channel,
            second=cpu.channel,
            first_keeps=_share_kept(other.channel, cpu.channel, rounds),
            second_keeps=_share_kept(cpu.channel, other.channel, rounds),
        )
        for other in others
    )


def rates_together(works: Sequence[BackgroundWork], window_s: float) -> list[float]:
    """Repeat all works at once, each in its thread, and return the rate of each.

    Only calls that end while every work is under way count, from the first end on, so that
    neither warm-up nor what one does after the others have ended is taken for contention.
    """
    ends: list[list[float]] = [[] for _ in works]
    # Works that have not been under way beside all others for long enough.
    waiting = set(range(len(works)))

    def repeat(index: int) -> None:
        mine = ends[index]
        try:
            with torch.inference_mode():
                while waiting:
                    works[index].call()
                    mine.append(time.perf_counter())
                    if all(ends) and _is_enough(mine, max(e[0] for e in ends), window_s):
                        waiting.discard(index)
        except BaseException:
            waiting.clear()
            raise

    with ThreadPoolExecutor(len(works), thread_name_prefix="contention") as pool:
        futures = [pool.submit(repeat, index) for index in range(len(works))]
    for future in futures:
        future.result()
    start, end = max(e[0] for e in ends), min(e[-1] for e in ends)
    rates = []
    for work, all_ends in zip(works, ends, strict=True):
        inside = [e for e in all_ends if start <= e <= end]
        rates.append((len(inside) - 1) * work.amount / (inside[-1] - inside[0]))
    return rates


def _is_enough(ends: Sequence[float], start: float, window_s: float) -> bool:
    # One call more than a rate takes: the last may end after the others' last.
    return ends[-1] >= start + window_s and sum(e >= start for e in ends) > MIN_CALLS


def _run_round(
    cpu: BackgroundWork, others: Sequence[BackgroundWork], repeater: Repeater
) -> dict[tuple[str, str], float]:
    """Return rates by channel and the channel beside it, which is empty for a rate alone."""
    window_s = repeater.effort.window_s
    figures = {(cpu.channel, ""): rates_together([cpu], window_s)[0]}
    for other in others:
        figures[other.channel, ""] = rates_together([other], window_s)[0]
        both = rates_together([other, cpu], window_s)
        figures[other.channel, cpu.channel], figures[cpu.channel, other.channel] = both
    return figures


def _share_kept(
    channel: str, beside: str, rounds: Sequence[Mapping[tuple[str, str], float]]
) -> float:
    share = statistics.median(f[channel, beside] / f[channel, ""] for f in rounds)
    return round(min(1.0, max(LEAST_KEPT, share)), 3)


def _cpu_work(
    plan: ComputePlan, rates: ComputeRates, has_gpu: bool, window_s: float
) -> BackgroundWork:
    if has_gpu:
        attend, num_bytes = decode_attention_call("cpu", DTYPE, plan)
        return BackgroundWork(
            channel="cpu_compute", unit="bytes_per_s", amount=num_bytes, call=attend
        )
    row_s = 2.0 * plan.out_features * plan.in_features / rates.matmul[DTYPE].at(MAX_ROWS)
    rows = max(1, min(MAX_ROWS, int(window_s / WANTED_CALLS / row_s)))
    multiply, flop = matrix_product("cpu", DTYPE, rows, plan)
    return BackgroundWork(channel="cpu_compute", unit="flop_per_s", amount=flop, call=multiply)


@contextlib.contextmanager
def _disk_works(offload_dir: Path) -> Iterator[list[BackgroundWork]]:
    with (
        noise_file(offload_dir, DISK_PLAN) as noise,
        DirectFile(
            noise.path, writable=True, num_threads=NUM_THREADS, request_bytes=REQUEST_BYTES
        ) as file,
    ):
        size = len(noise.chunk)
        offsets = itertools.cycle(range(0, noise.num_bytes, size))
        # Reads and writes never run at once, so they share the buffer.
        yield [
            BackgroundWork(
                channel=channel,
                unit="bytes_per_s",
                amount=size,
                call=partial(_move_next, move, noise.chunk, offsets),
            )
            for channel, move in (("disk_read", file.read_into), ("disk_write", file.write_from))
        ]


def _move_next(
    move: Callable[[memoryview, int], None], chunk: memoryview, offsets: Iterator[int]
) -> None:
    move(chunk, next(offsets))


def _h2d_work() -> BackgroundWork:
    copy, stream = link_copy("h2d", pinned=True), torch.cuda.Stream()
    torch.cuda.synchronize()

    def copy_and_wait() -> None:
        with torch.cuda.stream(stream):
            copy()
        stream.synchronize()

    return BackgroundWork(
        channel="h2d", unit="bytes_per_s", amount=BUFFER_BYTES, call=copy_and_wait
    )
