"""The machines of published runs, rebuilt as profiles.

Rates are derived from data sheets as those of the recorded machines are (see the ``source`` of
``profiles/data/a100-80gb.json``). Those are older than some of our kernels, so that rates of these
are replaced by what the kernels reach where they were measured: see ``with_kernels``.
"""

from __future__ import annotations

from dataclasses import replace

from profiles.compute_rates import ComputeRates
from profiles.hardware import Cpu, Gpu, HardwareProfile, Link
from profiles.rate_curve import RateCurve
from profiles.recorded import recorded_profile

GB, TB = 10**9, 10**12
ROWS = (1.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
HALVES = ("bfloat16", "float16")
# Sustained shares of what data sheets promise.
OF_FLOPS, OF_BANDWIDTH, OF_LINK, OF_MEMORY = 0.6, 0.8, 0.8, 0.95
OF_CPU_ATTENTION, OF_GPU_UNPACKING = 0.8, 0.45
# GFLOP/s of one core in products of 1, 4, 16 and 64 rows with encoded weights: the best of twelve
# calls of ``profiles.encoded_rates`` on a machine of the kind of ``cpu-2core``. What is missing is
# priced as Q4_0.
FEW_ROWS = (1.0, 4.0, 16.0, 64.0)
ENCODED_PER_CORE = {
    "Q4_0": (33.4, 56.4, 63.6, 79.1),
    "Q8_0": (32.5, 41.0, 56.1, 63.1),
    "Q4_K": (64.6, 139.2, 161.1, 176.3),
    "MXFP4": (46.9, 46.9, 51.5, 66.0),
    "E4M3": (10.8, 24.0, 49.7, 65.4),
}
# Bytes of an element of each.
ENCODED_BYTES = {"Q4_0": 0.5625, "Q8_0": 1.0625, "Q4_K": 0.5625, "MXFP4": 0.53125, "E4M3": 1.0}
# Bytes/s that a core unpacks: of ``h200-141gb``, whose CPU has 14 cores to compute with.
UNPACKED_PER_CORE = 8.4e9
MEASURED = "measured"


def with_kernels(machine: HardwareProfile) -> HardwareProfile:
    """Return a machine with the rates of our kernels, where its own are derived from torch's.

    On the CPU: products with encoded weights and unpacking, by cores, and attention at 0.8 of the
    memory's rate. On the GPU: unpacking at 0.45 of the memory's rate (``h100-80gb``).
    """
    if machine.source.startswith(MEASURED):
        return machine
    host, device = machine.cpu, machine.gpu
    attention = OF_CPU_ATTENTION * host.memory_bytes_per_s
    compute = replace(
        host.compute,
        attention_decode=dict.fromkeys(host.compute.attention_decode, attention),
        unpack_bytes_per_s=UNPACKED_PER_CORE * host.num_cores,
        packed_matmul=dict.fromkeys(HALVES, _encoded(host, "Q4_0")),
        encoded_matmul={kind: _encoded(host, kind) for kind in ENCODED_PER_CORE},
    )
    if device is not None:
        unpacking = OF_GPU_UNPACKING / OF_BANDWIDTH * device.memory_bytes_per_s
        device = replace(device, compute=replace(device.compute, unpack_bytes_per_s=unpacking))
    return replace(machine, cpu=replace(host, compute=compute), gpu=device)


def _encoded(host: Cpu, kind: str) -> RateCurve:
    """Return rates of all cores, which read each weight once."""
    read = 2 / ENCODED_BYTES[kind] * host.memory_bytes_per_s
    each = zip(FEW_ROWS, ENCODED_PER_CORE[kind], strict=True)
    return RateCurve(
        sizes=FEW_ROWS,
        rates=tuple(min(1e9 * rate * host.num_cores, rows * read) for rows, rate in each),
    )


def products(peak_flops: float, memory_bytes_per_s: float) -> RateCurve:
    """Return rates of products in 16 bits: at their best at ``OF_FLOPS`` of the peak, with few rows
    at that of reading the weights once."""
    best = OF_FLOPS * peak_flops
    return RateCurve(
        sizes=ROWS, rates=tuple(1 / (1 / best + 1 / (n * memory_bytes_per_s)) for n in ROWS)
    )


def rates(
    peak_flops: float, memory_bytes_per_s: float, *, attention: float, task_s: float
) -> ComputeRates:
    """Return the rates of a device in 16 bits; ``attention`` in bytes/s."""
    return ComputeRates(
        matmul=dict.fromkeys(HALVES, products(peak_flops, memory_bytes_per_s)),
        attention_prefill=dict.fromkeys(HALVES, 0.4 * peak_flops),
        attention_decode=dict.fromkeys(HALVES, attention),
        task_overhead_s=task_s,
    )


def cpu(name: str, *, cores: int, memory: float, bandwidth: float, flops: float) -> Cpu:
    """Rebuild a CPU from its installed memory, and its peaks in bytes/s and in FLOP/s."""
    sustained = OF_BANDWIDTH * bandwidth
    return Cpu(
        name=name,
        num_cores=cores,
        memory_bytes=round(OF_MEMORY * memory),
        memory_bytes_per_s=sustained,
        runtime_bytes=2**30,
        compute=rates(flops, sustained, attention=sustained, task_s=5e-5),
    )


def gpu(name: str, *, memory: float, bandwidth: float, flops: float, link: float) -> Gpu:
    """Rebuild a GPU from its memory, and its peaks in bytes/s and FLOP/s; ``link`` of a
    direction."""
    rate = OF_LINK * link
    there = Link(
        pinned_bytes_per_s=rate, pageable_bytes_per_s=rate / 2, opposed_bytes_per_s=0.85 * rate
    )
    return Gpu(
        name=name,
        memory_bytes=round(memory),
        memory_bytes_per_s=OF_BANDWIDTH * bandwidth,
        compute=rates(flops, OF_BANDWIDTH * bandwidth, attention=0.6 * bandwidth, task_s=1e-5),
        h2d=there,
        d2h=there,
    )


def rebuilt(name: str, host: Cpu, device: Gpu | None) -> HardwareProfile:
    """Return the machine of a source. None of them used a disk."""
    server = recorded_profile("epyc-server")
    return with_kernels(
        replace(
            server,
            name=name,
            source="derived from data sheets",
            cpu=host,
            gpu=device,
            disk=replace(server.disk, free_bytes=0),
        )
    )


# The instances of Google's cloud, with what the authors' own model assumes: 16 GiB/s of link, and
# 76 GiB/s of memory, which they have measured.
GCP_CPU = cpu("24 cores, 192 GiB", cores=24, memory=192 * 2**30, bandwidth=102 * GB, flops=2.7 * TB)
T4 = rebuilt(
    "T4",
    GCP_CPU,
    gpu("T4", memory=14.5 * 2**30, bandwidth=320 * GB, flops=65 * TB, link=15.75 * GB),
)
L4 = rebuilt(
    "L4", GCP_CPU, gpu("L4", memory=22 * 2**30, bandwidth=300 * GB, flops=121 * TB, link=17.2 * GB)
)
A5000_GPU = gpu("A5000", memory=23 * 2**30, bandwidth=768 * GB, flops=111 * TB, link=31.5 * GB)
RTX_4090 = recorded_profile("rtx4090-pc").gpu
# MoE-Gen names the GPU and the host's memory, not its processor: one of the A100's class is taken.
A5000, A5000_1TB = (
    rebuilt(
        f"A5000, {memory} GB",
        cpu("assumed", cores=64, memory=memory * GB, bandwidth=204.8 * GB, flops=5 * TB),
        A5000_GPU,
    )
    for memory in (512, 1024)
)
XEON = rebuilt(
    "RTX 4090 and one Xeon Gold 6454S",
    cpu("Xeon Gold 6454S", cores=32, memory=512 * GB, bandwidth=307 * GB, flops=20 * TB),
    RTX_4090,
)
EPYC_9135 = rebuilt(
    "EPYC 9135, 12 x DDR5-5600",
    cpu("EPYC 9135", cores=16, memory=768 * GB, bandwidth=537.6 * GB, flops=3.7 * TB),
    None,
)
I9 = rebuilt(
    "8 GB GPU and i9-14900K",
    cpu("i9-14900K", cores=8, memory=96 * GB, bandwidth=108.8 * GB, flops=4 * TB),
    gpu("RTX 3060 Ti", memory=7.5 * 2**30, bandwidth=448 * GB, flops=65 * TB, link=31.5 * GB),
)
