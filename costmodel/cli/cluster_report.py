"""The plan of a cluster, as a table for people."""

from __future__ import annotations

from costmodel.cluster.plan import ClusterPlan, CopyPlan
from costmodel.cluster.stages import stage_of
from costmodel.plan.rounding import overall_weights
from profiles.units import format_count, format_figure


def format_cluster_plan(plan: ClusterPlan) -> str:
    """Lay out what each node runs, what limits the whole, and what another node would bring."""
    lines = [
        f"{plan.model.name} on {format_count(len(plan.nodes), 'node')}:"
        f" {'one copy' if len(plan.copies) == 1 else f'{len(plan.copies)} copies'} of the model"
    ]
    for number, copy in enumerate(plan.copies, 1):
        lines += ["", *_copy_lines(number, copy)]
    if (predicted := plan.predicted) is not None:
        rate = predicted.throughput_tok_per_s
        lines += ["", f"throughput  {format_figure(rate)} token/s, limited by {predicted.limit}"]
        for more in predicted.one_more:
            gained = more.throughput_tok_per_s
            lines.append(
                f"another node like {more.like}: {format_figure(gained)} token/s"
                f" ({gained / rate:.2f} x)"
            )
    return "\n".join(lines)


def _copy_lines(number: int, copy: CopyPlan) -> list[str]:
    """Tell of the stages of a copy, one a line."""
    told = f"copy {number}: {copy.share:.0%} of the prompts"
    if (predicted := copy.predicted) is not None:
        told += f", {format_figure(predicted.throughput_tok_per_s)} token/s"
    lines = [told, f"  {'node':20}{'layers':>12}{'block':>12}{'weights':>18}"]
    for plan in copy.stages:
        stage, policy = stage_of(plan.policy.model), plan.policy
        weights = overall_weights(policy)
        shares = " ".join(f"{getattr(weights, tier):.0%}" for tier in ("gpu", "cpu", "disk"))
        block = f"{policy.gpu_batch_size} x {policy.num_gpu_batches}"
        layers = f"{stage.first} to {stage.end - 1}"
        lines.append(f"  {plan.node:20}{layers:>12}{block:>12}{shares:>18}")
    return [*lines, "  weights are shares on GPU, CPU and disk"]
