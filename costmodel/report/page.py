"""One HTML file that needs no other: written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from bokeh.resources import Resources
from jinja2 import Environment, StrictUndefined, Template

from costmodel.plan.policy import Policy
from costmodel.pricing.price import estimate
from costmodel.report.buying import Purchases
from costmodel.report.buying_section import buying_section
from costmodel.report.run_record import Measured
from costmodel.report.sections import (
    Plan,
    limits_section,
    memory_section,
    phases_section,
    placement_section,
)
from costmodel.report.task_sample import TaskSample, simulate_sample
from costmodel.report.timeline_section import MEASURED, SIMULATED, timeline_section
from profiles.files import to_json
from profiles.hardware import HardwareProfile
from profiles.outputs import write_output
from profiles.units import format_figure, format_seconds


def write_page(
    path: Path,
    policy: Policy,
    hardware: HardwareProfile,
    purchases: Purchases,
    *,
    measured: Measured | None = None,
    sample: TaskSample | None = None,
) -> None:
    """Write the report of a policy, and of its run if ``measured`` and ``sample`` tell of one."""
    policy = replace(policy, hardware=hardware)
    prediction = estimate(policy, hardware)
    plan = Plan(policy=policy, hardware=hardware, prediction=prediction, measured=measured)
    num_passes = measured.num_passes if measured else None
    samples = {SIMULATED: simulate_sample(policy, hardware, num_passes=num_passes)}
    if sample is not None:
        samples = {MEASURED: sample} | samples
    sections = [
        placement_section(plan),
        memory_section(plan),
        timeline_section(samples),
        phases_section(plan),
        limits_section(plan),
        buying_section(purchases),
    ]
    text = _template().render(
        title=f"{policy.model.name} on {hardware.name}",
        facts=_facts(plan),
        about=_about(plan),
        sections=sections,
        scripts=Resources(mode="inline", components=["bokeh"]).js_raw,
        policy=json.dumps(to_json(policy), indent=1),
    )
    write_output(path, lambda handle: handle.write(text))


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Of a picture's parts, later ones refer to earlier ones.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    text = files("costmodel.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(text)


def _facts(plan: Plan) -> Mapping[str, str]:
    """Return the figures at the top of the page."""
    policy, prediction, measured = plan.policy, plan.prediction, plan.measured
    facts = {}
    if measured is None:
        rate = format_figure(prediction.throughput_tok_per_s)
        facts["predicted throughput"] = f"{rate} token/s"
        facts["a block takes"] = format_seconds(prediction.latency_s)
    else:
        facts["measured throughput"] = f"{format_figure(measured.tok_per_s)} token/s"
        facts["predicted throughput"] = f"{format_figure(measured.predicted_tok_per_s)} token/s"
        facts["the run took"] = format_seconds(sum(measured.phase_s.values()))
    facts["block"] = f"{policy.block_size} sequences"
    facts["limited by"] = prediction.bottleneck.replace("_", " ")
    return facts


def _about(plan: Plan) -> list[str]:
    """Return what was planned or run, in sentences."""
    policy, hardware, measured = plan.policy, plan.hardware, plan.measured
    work = policy.workload
    count = measured.num_prompts if measured else work.num_prompts
    prompts = f"{count} prompts" if count else "Any number of prompts"
    lines = [
        f"{prompts} of at most {work.prompt_len} tokens, {work.gen_len} generated for each.",
        f"A block has {policy.num_gpu_batches} batches of {policy.gpu_batch_size} sequences;"
        f" prefill takes {policy.prefill_batch_size} at a time.",
        f"The model computes in {policy.model.dtype}.",
    ]
    if hardware.is_emulated:
        lines.append("The GPU is emulated.")
    if measured is None:
        lines.append("Nothing was run: all figures are predictions.")
    return lines
