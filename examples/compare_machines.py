"""Search policies for several machines. Neither the machines nor the weights are needed."""

from __future__ import annotations

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.optimum import search
from costmodel.plan.workload import Workload
from profiles import recorded_profile
from profiles.units import GIB

MODEL = "qwen3-30b-a3b"


def main() -> dict[str, float]:
    """Print the best throughput of each machine, and return them in token/s."""
    model = load_model_spec(MODEL)
    workload = Workload(prompt_len=256, gen_len=64, num_prompts=256)
    pc = recorded_profile("rtx4090-pc")
    machines = {
        "RTX 4090, 32 GiB": pc.with_budget(cpu_memory=32 * GIB),
        "RTX 4090, 64 GiB": pc,
        "RTX 3090, 64 GiB": recorded_profile("rtx3090-pc"),
    }
    found = {}
    for name, hardware in machines.items():
        result = search(hardware, model, workload)
        found[name] = result.job_tok_per_s
        print(f"{name}: {result.job_tok_per_s:.1f} token/s in blocks of {result.policy.block_size}")
    return found


if __name__ == "__main__":
    main()
