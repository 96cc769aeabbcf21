"""The sections of bytes: where everything is stored, and what each tier holds at its peak."""

from __future__ import annotations

from collections.abc import Mapping

from costmodel.cli.palette import BUFFER_COLORS, OTHER_BUFFERS, TIER_COLORS, TIER_NAMES
from costmodel.cli.policy_report import placed_bytes, tiers_of
from costmodel.cli.stored_weights import told_weights
from costmodel.pricing.memory import capacities
from costmodel.pricing.price import peak_buffers
from costmodel.report.charts import Bars, draw_bars
from costmodel.report.parts import Picture, Plan, Section, Table
from costmodel.report.run_record import Measured
from profiles.units import format_bytes


def placement_section(plan: Plan) -> Section:
    """Show where weights, cache and hidden states are stored."""
    placed = placed_bytes(plan.policy, plan.hardware)
    tiers = tiers_of(plan.hardware)
    bars, rows = Bars(), []
    for row, (name, (placement, total)) in enumerate(placed.items()):
        shares = {tier: getattr(placement, tier) for tier in tiers}
        parts = {
            TIER_NAMES[tier]: (
                share,
                TIER_COLORS[tier],
                f"{share:.1%}, {format_bytes(share * total)}",
            )
            for tier, share in shares.items()
        }
        bars.add_stack(row, parts)
        rows.append([name, *(_bytes(share * total) for share in shares.values())])
    return Section(
        name="placement",
        title="Where everything is stored",
        text=_placement_text(plan),
        legend={TIER_NAMES[tier]: TIER_COLORS[tier] for tier in tiers},
        pictures=[
            Picture(
                item=draw_bars(bars, list(placed), x_label="share", x_format="0%", x_end=1.0),
                title="Share of each component on each tier",
            )
        ],
        table=Table(headers=["", *(TIER_NAMES[tier] for tier in tiers)], rows=rows),
    )


def _placement_text(plan: Plan) -> list[str]:
    policy = plan.policy
    what = "one block" if policy.lanes is None else "all lanes"
    text = [f"Weights by component, then the KV cache and the hidden states of {what}."]
    if plan.hardware.has_gpu and policy.cache.gpu < 1:
        share = policy.cpu_attention
        text.append(
            f"The CPU attends to {share:.0%} of the cache outside the GPU."
            if share
            else "The GPU attends to all of the cache."
        )
    if policy.cpu_experts and policy.weights.get("experts") is not None:
        text.append(f"The CPU multiplies {policy.cpu_experts:.0%} of the experts in its memory.")
    if policy.is_compressed or policy.model.is_encoded:
        text.append(
            f"Weights are {told_weights(policy)}. The cache has {policy.cache_bits} bits."
            f" A query attends to {policy.attention_sparsity:.0%} of the keys."
        )
    return text


def memory_section(plan: Plan) -> Section:
    """Show each tier's buffers at its peak, against the budget."""
    limits = capacities(plan.hardware)
    peaks = peak_buffers(plan.policy, plan.hardware)
    bars, used = Bars(), dict[str, str]()
    for row, tier in enumerate(limits):
        # A tier without capacity has nothing to draw.
        share_of = 1 / limits[tier] if limits[tier] else 0.0
        amounts = dict.fromkeys(BUFFER_COLORS, 0.0)
        for buffer, size in peaks[tier].items():
            amounts[buffer if buffer in BUFFER_COLORS else OTHER_BUFFERS] += size
        parts = {
            buffer: (size * share_of, BUFFER_COLORS[buffer], format_bytes(size))
            for buffer, size in amounts.items()
        }
        bars.add_stack(row, parts)
        used |= {name: BUFFER_COLORS[name] for name, size in amounts.items() if size >= 1}
    text = ["The buffers of each tier when it holds most, as a share of its budget."]
    if plan.hardware.is_emulated:
        text.append("The GPU is emulated in CPU memory.")
    if plan.measured is not None:
        text += _together_lines(plan.measured)
    return Section(
        name="memory",
        title="Memory at its peak",
        text=text,
        legend={name: color for name, color in BUFFER_COLORS.items() if name in used},
        pictures=[
            Picture(
                item=draw_bars(
                    bars,
                    [TIER_NAMES[tier] for tier in limits],
                    x_label="share of the budget",
                    x_format="0%",
                    line_at=1.0,
                ),
                title="Buffers of each tier at its peak, as a share of its budget",
            )
        ],
        table=_memory_table(plan, peaks, limits),
    )


def _together_lines(measured: Measured) -> list[str]:
    """Tell of tiers that can only be measured together."""
    return [
        f"Together, {name} peaked at {format_bytes(size)};"
        f" {format_bytes(measured.predicted_peak_bytes[name])} were predicted."
        for name, size in measured.peak_bytes.items()
        if name not in TIER_NAMES
    ]


def _memory_table(
    plan: Plan, peaks: Mapping[str, Mapping[str, float]], limits: Mapping[str, int]
) -> Table:
    names = dict.fromkeys(name for terms in peaks.values() for name in terms)
    rows = []
    for name in names:
        sizes = [terms.get(name, 0.0) for terms in peaks.values()]
        if max(sizes) >= 1:
            rows.append([name, *map(_bytes, sizes)])
    rows.append(["predicted peak", *(format_bytes(sum(t.values())) for t in peaks.values())])
    if plan.measured is not None:
        found = plan.measured.peak_bytes
        cells = [format_bytes(found[tier]) if tier in found else "" for tier in peaks]
        rows.append(["measured peak", *cells])
    rows.append(["budget", *(format_bytes(limits[tier]) for tier in peaks)])
    return Table(headers=["", *(TIER_NAMES[tier] for tier in peaks)], rows=rows)


def _bytes(size: float) -> str:
    return format_bytes(size) if size >= 1 else ""
